// server-steer-store.h - vectors by name, running requests and defaults: what HTTP threads may touch. Everything here may be called
// from any thread, once open() has returned.
#ifndef SERVER_STEER_STORE_H
#define SERVER_STEER_STORE_H

#include "server-steer.h"

#include <mutex>

struct common_params;
struct common_chat_templates;

// Keeps the id of a request in the list of running ones for as long as its answer is alive.
struct server_steer_ticket;

struct server_steer_store {
    // Before the first request. False: the server must not start; the reason is logged.
    bool open(llama_context * ctx, const common_params & params, bool drafts);

    int32_t n_embd() const { return info.n_embd; }
    int32_t n_streams() const { return info.n_streams; }
    bool has_drafts() const { return drafts; }
    const llama_steer_info & model_info() const { return info; }

    // -- requests; these throw server_steer_error --

    // The steering fields of a body; null when it has none and there is no default.
    // `templates`: of the route, if it renders one, whose tags are in `data`; else null.
    server_steer_request_ptr parse(const json & data, const std::string & id, const common_chat_templates * templates, std::shared_ptr<server_steer_ticket> & ticket);
    // The same for the reading and scoring routes: no default applies.
    server_steer_request parse_special(const json & body, const std::string & id, std::shared_ptr<server_steer_ticket> & ticket);
    server_steer_terms parse_terms(const json & value);
    std::shared_ptr<const server_steer_read_spec> parse_read(const json & body, int32_t n_ctx) const;
    void check_running(const std::string & id);

    // -- vectors; these throw server_steer_error --

    json describe(const json & server, const std::set<std::string> & ids); // of the requests, only those that are asked for
    // `force`: for a model that differs in its norms; `replace`: whatever has that name.
    json put_vector(const std::string & name, const std::string & body, bool force, bool replace);
    json delete_vector(const std::string & name);

    // -- what the main thread tells of the requests that run --

    void note_start(const server_steer_request & request); // by one more slot
    void note_end(const server_steer_request & request);
    void note_token(const server_steer_request & request);
    void note_terms(const server_steer_request & request);
    void note_device(size_t bytes);
    bool is_running(const server_steer_request & request); // its client is still there

private:
    struct running_request {
        uint64_t serial = 0;
        server_steer_terms terms;
        bool started = false;
        int32_t n_slots = 0; // that work on it now
        int32_t n_tokens = 0;
    };

    void load_configured(const std::string & folder, const std::string & default_terms);
    void check_terms(const server_steer_request & request, bool raw) const;
    std::shared_ptr<server_steer_ticket> reserve(server_steer_request & request);
    running_request * entry_of(const server_steer_request & request); // under the mutex; null: its client has gone

    // of the model; never changed after open()
    llama_steer_info info = {};
    bool drafts = false;
    bool is_open = false;
    std::string unsupported; // why nothing can be steered
    server_steer_identity identity;
    server_steer_terms defaults;

    mutable std::mutex mutex; // guards what follows
    std::map<std::string, server_steer_vector_ptr> vectors;
    std::vector<std::weak_ptr<const server_steer_vector>> alive; // those, and those that only requests still use
    std::map<std::string, running_request> running;              // by request id
    uint64_t next_serial = 1;
    size_t device_bytes = 0;

    friend struct server_steer_ticket;
};

// Does a template speak of thinking without a tag that would tell where it ends? Then neither scope can be followed.
bool server_steer_thinks_untold(const common_chat_templates * templates, bool has_tags);

#endif // SERVER_STEER_STORE_H
