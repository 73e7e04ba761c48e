// server-steer-slots.h - which slot gets what. For the queue's main thread only: it touches the context, between two decodes (the read
// callback runs inside one, on the thread that decodes, while the main thread answers what touches nothing of ours).
//
// When a term acts and what it applies is the planner's (llama-steer-plan.h): a slot has a plan, tells it the text of its response and
// lets the context apply what comes out.
#ifndef SERVER_STEER_SLOTS_H
#define SERVER_STEER_SLOTS_H

#include "server-steer-store.h"

struct server_steer_slots {
    explicit server_steer_slots(server_steer_store & store);
    ~server_steer_slots();

    // After the context is made, also on resume.
    void attach(llama_context * ctx, int32_t n_slots);
    void detach();

    // -- a task becomes a slot's; these throw server_steer_error --

    // Work out which edits the tokens of a task will get, before a slot is looked for.
    void plan(const server_steer_request_ptr & request, server_tokens & tokens);
    // Does a request have to wait until another has ended, because both cannot be read at once?
    bool must_wait(const server_steer_request_ptr & request) const;
    void launch(int slot, const server_steer_request_ptr & request, const server_tokens & tokens);
    // Replace the terms of a running slot; `fresh`: nothing of it was computed yet. The position of the first token concerned.
    llama_pos change(int slot, const server_steer_terms & terms, const server_tokens & done, server_tokens & input, bool fresh);
    // Decide the gates of a slot that has come to the token that they hold back; `tokens` are its task's.
    void decide(int slot, int32_t index, const server_tokens & tokens);
    void on_token(int slot, llama_token token, llama_pos pos_next);
    // What went wrong with the slot in the last decode.
    void check_decoded(int slot);

    // -- what of a cache a slot may use --

    // How many cached tokens may be reused: what is to be read has to be computed.
    int reuse_limit(int slot, const server_tokens & cached, int n_past) const;
    bool is_exact(int slot) const; // it reads or scores: no state will do that was computed at another position
    // The last token that a checkpoint may hold where the token at pos_next is to be computed anew. The stock server takes one that
    // holds this very token, which is then the former prompt's; once anything was steered, no such checkpoint is kept.
    llama_pos last_checkpoint(llama_pos pos_next) const { return ever_steered ? pos_next - 1 : pos_next; }
    // May states be moved to other positions (--cache-reuse)? Not where steering or reading has a say.
    bool can_shift(int slot, const server_tokens & cached, const server_tokens & wanted) const;
    // Was anything steered in this context? Then a cache may hold what is not finite.
    bool has_steered() const { return ever_steered; }

    // -- the life of a slot --

    // Is this token the one that a gate holds back until the tokens before it were read?
    bool holds_back(int slot, int32_t index) const;
    // From here on the cached tokens of a slot are its task's: what it kept of those before was chosen.
    void begin(int slot);
    // A slot takes over what another one has computed: completions of one prompt.
    void copy(int from, int to);
    // `tokens`: what the slot's cache holds; they are told what was applied to them.
    void release(int slot, server_tokens & tokens);
    // May the context of a slot be shifted? Not where positions mean something; afterwards they do not.
    bool shift(int slot);
    bool runs(int slot, const std::string & id);

    bool ends_at_prompt(int slot) const; // a read task: nothing is sampled
    bool forces(int slot) const;         // a score task
    llama_token force(int slot, const float * logits, int32_t n_vocab, llama_token sampled);
    std::shared_ptr<server_steer_values> take_values(int slot); // of a read or score task, else null

    enum part_t { CHUNK,
                  STREAM_END,
                  WHOLE };
    std::shared_ptr<server_steer_extra> extra(int slot, part_t part); // null: nothing

private:
    struct slot_state;
    struct plan_deleter {
        void operator()(llama_steer_plan * plan) const { llama_steer_plan_free(plan); }
    };
    using plan_ptr = std::unique_ptr<llama_steer_plan, plan_deleter>;

    plan_ptr make_plan(const server_steer_request & request, const server_tokens & tokens, const slot_state * decided) const;
    void apply(int slot, slot_state & s, llama_pos from);
    void set_gates(slot_state & s, const server_tokens & tokens);
    void set_captures(int slot, slot_state & s, const server_tokens & tokens);
    size_t capture_bytes(size_t n_places, bool all_streams, bool many_rows) const;
    void note_memory();
    bool on_rows(const llama_steer_rows & rows);
    void check(int32_t status) const; // a llama_steer call

    server_steer_store & store;
    llama_context * ctx = nullptr;
    const llama_vocab * vocab = nullptr;
    bool ever_steered = false; // in this context

    std::vector<std::unique_ptr<slot_state>> slots;

    std::set<std::pair<int32_t, int32_t>> captures; // (layer, site)
    bool all_streams = false;
    bool many_rows = false;
};

#endif // SERVER_STEER_SLOTS_H
