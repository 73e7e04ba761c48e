// server-steer.h - the words of steering in llama-server: vectors, terms, requests and what is answered.
//
// Two classes use them. server_steer_store (server-steer-store.h) is what HTTP threads may touch: vectors by name, running requests,
// the parsing of a request. server_steer_slots (server-steer-slots.h) is what only the queue's main thread may: which slot gets what.
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
#define SERVER_STEER_CONTROL  "steering" // action of the control task that changes a running request

// An error with its HTTP status, for the client. (llama-server takes an invalid_argument for a 400.)
struct server_steer_error : std::invalid_argument {
    int code;
    server_steer_error(int code, const std::string & message)
        : std::invalid_argument(message), code(code) {}
    json to_json() const; // what goes under "error"
};

// ---- vectors ----

struct server_steer_identity {
    std::string architecture;
    std::string tokens_sha256;
    std::string norms_sha256;
    std::string name;
    int32_t n_layer = 0;
    int32_t n_embd = 0;
    int32_t n_streams = 1;

    json to_json() const;
};

// The identity of the model in a GGUF file (docs/vector-format.md). Throws server_steer_error.
server_steer_identity server_steer_identity_of(const std::string & path, int32_t n_layer, int32_t n_embd, int32_t n_streams);

// What makes a vector file a gate: a condition on the prompt (docs/vector-format.md).
struct server_steer_gate {
    double threshold = 0.0;
    bool above = true;
    bool mean = true; // of the tokens but the first and the last; false: the one before the last

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
    std::vector<int32_t> layers;             // [n] of each direction, sorted with sites
    std::vector<int32_t> sites;              // [n]
    std::vector<double> scales;              // [n] dose at strength 1
    std::vector<float> dirs;                 // [n][n_embd] unit directions
    std::vector<llama_steer_column> columns; // what reads the state, at places that have a direction
    std::vector<float> reads;                // [columns][n_embd] unit rows
    std::vector<float> writes;               // the same
    std::optional<server_steer_gate> gate;   // then n is 1

    llama_steer_vector native = {}; // the same, for plans

    size_t n() const { return layers.size(); }
    size_t bytes() const { return (dirs.size() + reads.size() + writes.size()) * sizeof(float); }
};

using server_steer_vector_ptr = std::shared_ptr<const server_steer_vector>;

// Parse a vector file; throws server_steer_error with what is wrong. `model`: it has to fit, `force` as in the protocol.
server_steer_vector_ptr server_steer_parse_vector(const std::string & file, const server_steer_identity & model, const llama_steer_info & info, bool force);

// ---- requests ----

struct server_steer_term {
    std::string name;
    server_steer_vector_ptr vector;
    server_steer_vector_ptr gate;    // null: none
    llama_steer_plan_term spec = {}; // all but its pointers
    json given;                      // as the client wrote it

    bool is_active() const { return spec.strength != 0.0; }
    bool has_phase() const { return is_active() && (spec.scope == LLAMA_STEER_SCOPE_THINKING || spec.scope == LLAMA_STEER_SCOPE_ANSWER); }
};

using server_steer_terms = std::vector<server_steer_term>;

// The tags that part a response, as text. Empty: there is none.
struct server_steer_tags {
    std::vector<std::string> open;
    std::vector<std::string> close;
    std::vector<std::string> tool_open;
    std::vector<std::string> tool_close;
    std::optional<std::string> generation_prompt; // what the template put in front of a response
    bool all_tools = false;                       // the whole response is a tool call
    bool known = false;                           // false: a raw route that named none, or a model whose thoughts cannot be told
};

struct server_steer_read_spec {
    enum kind_t { LAST,
                  ALL,
                  MEAN,
                  RESPONSE,
                  RESPONSE_MEAN,
                  LIST } kind = LAST;
    std::vector<int32_t> layers;
    std::vector<int64_t> list; // positions of LIST
    int32_t site = 0;
    bool streams = false; // all of them, not their mean
    bool is_mean() const { return kind == MEAN || kind == RESPONSE_MEAN; }
};

// What a request asks for. Immutable: a live change makes another one.
struct server_steer_request {
    std::string id;
    uint64_t serial = 0; // ids may be used again, this is not
    bool named = false;  // the client wants to know the id
    server_steer_terms terms;
    server_steer_tags tags;
    std::vector<std::string> probe_names;
    std::vector<server_steer_vector_ptr> probes;

    std::shared_ptr<const server_steer_read_spec> read;
    llama_tokens forced; // score these tokens in place of sampled ones
    bool scores = false;
    int32_t n_prompt = -1; // of a read or score task: tokens before the response

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
    std::vector<float> values;      // [n_layers][n_rows][n_streams or 1][n_embd]
    std::vector<double> logprobs;
    int32_t n_prompt = 0;
};

// What a chunk with a token, the end of a stream or a whole answer tells besides.
struct server_steer_extra {
    std::string request_id; // "": not this time
    bool has_tokens = false;
    llama_tokens tokens; // since the last chunk
    std::vector<std::string> probe_names;
    std::vector<std::vector<double>> probes; // [names][tokens]: of the chunk's one token, or of the whole answer
    bool whole = false;
};

// Answer of the steering tasks: what was read or scored, or where a live change begins.
struct server_task_result_steer : server_task_result {
    std::shared_ptr<server_steer_values> values;
    std::vector<int32_t> positions;
    json to_json() override { return json::object(); }
};

// An error of ours, with the status that it has: llama-server's own know only some.
struct server_task_result_steer_error : server_task_result_error {
    server_steer_error error;
    explicit server_task_result_steer_error(const server_steer_error & e)
        : error(e) { err_msg = e.what(); }
    json to_json() override { return error.to_json(); }
};

// The steering fields of a body that a conversion between APIs would drop.
void server_steer_copy_fields(const json & from, json & to);

// Put what steering tells into an answer.
void server_steer_merge(json & answer, const server_steer_extra & extra);

#endif // SERVER_STEER_H
