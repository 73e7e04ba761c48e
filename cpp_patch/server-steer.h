// server-steer.h - steering for llama-server: vectors by name, terms of requests, and which slot gets what.
//
// Threads. HTTP threads parse requests and keep the vectors; all that touches the context runs on the queue's main thread,
// between two decodes. The read callback runs on the main thread too, inside a decode. What both sides use is behind `mutex`.
#ifndef SERVER_STEER_H
#define SERVER_STEER_H

#include "../../src/llama-steer.h"
#include "server-http.h"
#include "server-task.h"

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#define SERVER_STEER_PROTOCOL 1
#define SERVER_STEER_CONTROL "steering" // action of the control task that changes a running request

// An error with its HTTP status, for the client. (llama-server takes an invalid_argument for a 400.)
struct server_steer_error : std::invalid_argument {
    int code;
    server_steer_error(int code, const std::string & message) : std::invalid_argument(message), code(code) {}
    json to_json() const; // what goes under "error"
};

// ---- vectors ----

struct server_steer_identity {
    std::string architecture;
    std::string tokens_sha256;
    std::string norms_sha256;
    std::string name;
    int32_t n_layer   = 0;
    int32_t n_embd    = 0;
    int32_t n_streams = 1;

    json to_json() const;
};

// The identity of the model in a GGUF file (docs/vector-format.md). Throws server_steer_error.
server_steer_identity server_steer_identity_of(const std::string & path, int32_t n_layer, int32_t n_embd, int32_t n_streams);

// What makes a vector file a gate: a condition on the prompt (docs/vector-format.md).
struct server_steer_gate {
    double threshold = 0.0;
    bool   above     = true;
    bool   mean      = true; // of the tokens but the first and the last; false: the one before the last

    bool operator==(const server_steer_gate & other) const {
        return threshold == other.threshold && above == other.above && mean == other.mean;
    }
};

// A parsed vector file. Immutable, shared by the store and by the requests that use it.
struct server_steer_vector {
    std::string content_sha256;
    std::string op;
    std::string scope;
    int32_t n_embd = 0;
    std::vector<int32_t> layers; // [n] of each direction, sorted with sites
    std::vector<int32_t> sites;  // [n]
    std::vector<double>  scales; // [n] dose at strength 1
    std::vector<float>   dirs;   // [n][n_embd] unit directions
    std::optional<server_steer_gate> gate; // then n is 1

    size_t n() const { return layers.size(); }
    size_t bytes() const { return dirs.size()*sizeof(float); }
};

using server_steer_vector_ptr = std::shared_ptr<const server_steer_vector>;

// Parse a vector file; throws server_steer_error with what is wrong. `model`: it has to fit, `force` as in the protocol.
server_steer_vector_ptr server_steer_parse_vector(const std::string & file, const server_steer_identity & model, const llama_steer_info & info, bool force);

// ---- requests ----

// How the strength of a term decays over the tokens of a response (docs/grammar.md).
struct server_steer_schedule {
    enum kind_t { CONSTANT, LINEAR, COSINE } kind = CONSTANT;
    int32_t over  = 0;
    double  floor = 0.0;

    double factor(int32_t n) const; // where response token n is decided
};

struct server_steer_term {
    std::string name;
    server_steer_vector_ptr vector;
    int32_t op       = 0;
    double  strength = 1.0;
    int32_t il_first = -1;
    int32_t il_last  = -1;
    int32_t stream   = LLAMA_STEER_STREAM_ALL;

    enum scope_t { ALL, PROMPT, RESPONSE, THINKING, ANSWER, RANGE } scope = ALL;
    llama_pos first = 0;
    llama_pos last  = -1; // of a range, inclusive; -1: no end

    server_steer_schedule schedule;
    server_steer_vector_ptr gate; // null: none

    double strength_at(int32_t n) const { return strength*schedule.factor(n); }

    json given; // as the client wrote it
};

using server_steer_terms = std::vector<server_steer_term>;

// The tags that part a response, as text. Empty: there is none.
struct server_steer_tags {
    std::string open;
    std::vector<std::string> close;
    std::string generation_prompt;    // what the template puts in front of a response
    std::vector<std::string> tool_open;
    std::vector<std::string> tool_close;
    bool all_tools = false;           // the whole response is a tool call
    bool known     = false;           // false: a raw route that named none
};

struct server_steer_read_spec {
    enum kind_t { LAST, ALL, MEAN, RESPONSE, RESPONSE_MEAN, LIST } kind = LAST;
    std::vector<int32_t> layers;
    std::vector<int64_t> list; // positions of LIST
    int32_t site       = 0;
    bool    streams    = false; // all of them, not their mean
    bool is_mean() const { return kind == MEAN || kind == RESPONSE_MEAN; }
};

// What a request asks for. Immutable: a live change makes another one.
struct server_steer_request {
    std::string id;
    uint64_t serial = 0; // ids may be used again, this is not
    bool named = false; // the client wants to know the id
    server_steer_terms terms;
    server_steer_tags  tags;
    std::vector<std::string>             probe_names;
    std::vector<server_steer_vector_ptr> probes;

    std::shared_ptr<const server_steer_read_spec> read;
    llama_tokens forced;  // score these tokens in place of sampled ones
    bool scores   = false;
    int32_t n_prompt = -1; // of a read or score task: tokens before the response

    bool has_phases() const;
    bool special() const { return read || scores; }
    bool has_gates() const;
};

using server_steer_request_ptr = std::shared_ptr<const server_steer_request>;

// Keeps the id of a request in the list of running ones for as long as its answer is alive.
struct server_steer_ticket;

// Result of a read or score task.
struct server_steer_values {
    llama_tokens tokens;
    std::vector<int32_t> positions; // [n_rows]
    std::vector<float>   values;    // [n_layers][n_rows][n_streams or 1][n_embd]
    std::vector<double>  logprobs;
    int32_t n_prompt = 0;
};

// Answer of the steering tasks: what was read or scored, or where a live change begins.
struct server_task_result_steer : server_task_result {
    std::shared_ptr<server_steer_values> values;
    std::vector<int32_t> positions;
    json to_json() override { return json::object(); }
};

// ---- the server's part ----

struct server_steer {
    server_steer();
    ~server_steer();

    // -- life of the context (main thread) --

    // After the context is made, also on resume. False: the server must not start; the reason is logged.
    bool attach(llama_model * model, llama_context * ctx, const std::string & path, int32_t n_slots, bool drafts);
    void detach();

    // -- requests (HTTP threads) --

    // The steering fields of a body; null when it has none and there is no default. Throws server_steer_error.
    // `templated`: the route renders a chat template, whose tags are in `data`.
    server_steer_request_ptr parse(const json & data, const std::string & id, bool templated, std::shared_ptr<server_steer_ticket> & ticket);
    // The same for the reading and scoring routes: no default applies.
    server_steer_request parse_special(const json & body, const std::string & id, std::shared_ptr<server_steer_ticket> & ticket);
    server_steer_terms parse_terms(const json & value);
    std::shared_ptr<const server_steer_read_spec> parse_read(const json & body) const;
    static void refuse(const json & body, const char * what); // throws when the body asks for steering or probes

    int32_t n_embd()     const { return info.n_embd; }
    int32_t n_streams()  const { return info.n_streams; }
    bool    has_drafts() const { return drafts; }

    json describe(const json & server);
    json put_vector(const std::string & name, const std::string & body, bool force);
    json delete_vector(const std::string & name);
    void check_running(const std::string & id);

    // -- slots (main thread); these throw server_steer_error --

    // Work out which edits the tokens of a task will get, before a slot is looked for.
    void plan(const server_steer_request_ptr & request, server_tokens & tokens);
    void launch(int slot, const server_steer_request_ptr & request, const server_tokens & tokens);
    // Replace the terms of a running slot; `fresh`: nothing of it was computed yet. The position of the first token concerned.
    llama_pos change(int slot, const server_steer_terms & terms, const server_tokens & done, server_tokens & input, bool fresh);

    // How many cached tokens may be reused: what is to be read has to be computed.
    int  reuse_limit(int slot, int n_past) const;
    // The last token that a checkpoint may hold where the token at pos_next is to be computed anew. The stock server takes one that
    // holds this very token, which is then the former prompt's; once anything was steered, no such checkpoint is kept.
    llama_pos last_checkpoint(llama_pos pos_next) const { return ever_steered ? pos_next - 1 : pos_next; }
    // May states be moved to other positions (--cache-reuse)? Not where steering or reading has a say.
    bool can_shift(int slot, const server_tokens & cached, const server_tokens & wanted) const;
    // Is this token the one that a gate holds back until the tokens before it were read?
    bool holds_back(int slot, int32_t index) const;
    // Decide the gates of a slot that has come to that token; `tokens` are its task's.
    void decide(int slot, int32_t index, const server_tokens & tokens);
    // From here on the cached tokens of a slot are its task's: what it kept of those before was chosen.
    void begin(int slot);
    // A slot takes over what another one has computed: completions of one prompt.
    void copy(int from, int to);
    void on_token(int slot, llama_token token, llama_pos pos_next);
    // `tokens`: what the slot's cache holds; they are told what was applied to them.
    void release(int slot, server_tokens & tokens);
    // May the context of a slot be shifted? Not where positions mean something; afterwards they do not.
    bool shift(int slot);
    bool runs(int slot, const std::string & id);

    bool ends_at_prompt(int slot) const; // a read task: nothing is sampled
    bool forces(int slot) const;         // a score task
    llama_token force(int slot, const float * logits, int32_t n_vocab, llama_token sampled);
    std::shared_ptr<server_steer_values> take_values(int slot); // of a read or score task, else null

    // What goes into the JSON of a chunk with a token, of the end of a stream, or of a whole answer; null: nothing.
    enum part_t { CHUNK, STREAM_END, WHOLE };
    json extra(int slot, part_t part);
    static void merge(json & answer, const json & extra);

private:
    struct slot_state;
    struct segment;
    struct running_request {
        uint64_t serial  = 0;
        json    steering = json::array();
        bool    started  = false;
        int32_t n_slots  = 0; // that work on it now
        int32_t n_tokens = 0;
    };
    struct config_use {
        int32_t  id   = 0;
        int32_t  refs = 0; // slots that use it
        uint64_t last = 0;
        bool     proved = false; // every place of it has been seen to fire
        std::vector<std::string> columns; // content hashes
    };
    struct column_use {
        int32_t  id   = 0;
        int32_t  refs = 0; // configs that use it
        uint64_t last = 0;
    };

    const std::string & config_for(const server_steer_terms & terms, const segment & part);
    int32_t column_for(const server_steer_vector_ptr & vector);
    void    purge(size_t keep_configs, size_t keep_columns);
    std::vector<segment> segments(const server_steer_request & request, const server_tokens & tokens, slot_state & s);
    void    set_ranges(int slot, slot_state & s, const std::vector<segment> & segments);
    void    set_gates(slot_state & s, const server_tokens & tokens);
    void    prove(slot_state & s);
    void    set_taps(int slot, slot_state & s, const server_tokens & tokens);
    void    check_phases(const server_steer_terms & terms, const server_steer_tags & tags) const;
    void    load_configured();
    void    note_memory();
    bool    on_rows(const llama_steer_rows & rows);
    void    check(int32_t status) const; // a llama_steer call
    std::shared_ptr<server_steer_ticket> reserve(server_steer_request & request);
    running_request * entry_of(const server_steer_request & request); // under the mutex; null: its client has gone

    llama_model   * model = nullptr;
    llama_context * ctx   = nullptr;
    const llama_vocab * vocab = nullptr;
    llama_steer_info info = {};
    bool drafts    = false;
    bool ever_steered = false; // in this context
    std::string unsupported; // why nothing can be steered
    server_steer_identity identity;

    std::vector<std::unique_ptr<slot_state>> slots;
    std::map<std::string, config_use> configs; // by their terms, written out
    std::map<std::string, column_use> columns; // by content hash
    std::string no_config;                     // the key of config 0
    int32_t  next_config = 1;
    uint64_t clock = 0;

    std::set<std::pair<int32_t, int32_t>> taps; // (layer, site)
    bool taps_all_streams = false;
    bool taps_many_rows   = false;

    mutable std::mutex mutex; // guards what follows
    std::map<std::string, server_steer_vector_ptr> store;
    std::map<std::string, running_request> running; // by request id
    uint64_t next_serial = 1;
    server_steer_terms defaults;
    bool   ready = false;
    size_t device_bytes = 0;

    friend struct server_steer_ticket;
};

// The handler of every steering route of a router: 501.
server_http_res_ptr server_steer_router(const server_http_req & req);

// Take --steering and --steering-dir out of a command line, before llama.cpp's own parser sees it.
void server_steer_take_args(int & argc, char ** argv);

// The steering fields of a body that a conversion between APIs would drop.
void server_steer_copy_fields(const json & from, json & to);

bool server_steer_is_route(const std::string & path);

// Body of a steering route that is too large or of unknown length: the HTTP status to refuse it with, else 0.
int server_steer_body_status(const std::string & method, const std::string & path, const std::string & content_length);

#endif // SERVER_STEER_H
