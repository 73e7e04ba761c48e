// server-steer-slots.cpp - the life of a slot: its plan, live changes, and what its cached tokens are remembered by.

#include "server-steer-state.h"

#include "common.h"

server_steer_slots::server_steer_slots(server_steer_store & store)
    : store(store) {}
server_steer_slots::~server_steer_slots() = default;

void server_steer_slots::check(int32_t status) const {
    if (status == LLAMA_STEER_OK) {
        return;
    }
    const int code = status == LLAMA_STEER_ERR_LIMIT || status == LLAMA_STEER_ERR_MEMORY ? 503 : status == LLAMA_STEER_ERR_INTERNAL ? 500
                                                                                                                                    : 400;
    throw server_steer_error(code, std::string("steering: ") + llama_steer_error(ctx));
}

// ---- plans ----

// Terms as the planner takes them. `decided`: a slot whose gates say which of them act; null: no gate is decided, none of these acts.
static std::vector<llama_steer_plan_term> specs_of(const server_steer_terms & terms, const std::function<bool(const server_steer_vector &)> & is_open) {
    std::vector<llama_steer_plan_term> res;
    for (const auto & term : terms) {
        auto spec = term.spec;
        spec.name = term.name.c_str();
        spec.vector = &term.vector->native;
        if (term.gate && !is_open(*term.gate)) {
            spec.strength = 0.0;
        }
        res.push_back(spec);
    }
    return res;
}

// The plan of all tokens of a task, fed with the response if one is given.
server_steer_slots::plan_ptr server_steer_slots::make_plan(const server_steer_request & request, const server_tokens & tokens, const slot_state * decided) const {
    const auto positions = server_steer_positions(tokens);
    const size_t n_prompt = request.n_prompt >= 0 ? (size_t) request.n_prompt : tokens.size();
    const auto text_of = [&](size_t i) { return tokens[i] != LLAMA_TOKEN_NULL ? common_token_to_piece(vocab, tokens[i], true) : std::string(); };

    server_steer_plan_tags tags(request.tags);
    if (!request.tags.generation_prompt && (!request.tags.open.empty() || !request.tags.close.empty())) {
        // a tag of four bytes or more has no more tokens than that, and some white space may follow it
        for (size_t i = n_prompt - std::min(n_prompt, server_steer_plan_tags::MAX_END); i < n_prompt; ++i) {
            tags.prompt_end += text_of(i);
        }
    }
    const auto native = tags.native();
    const auto terms = specs_of(request.terms, [&](const server_steer_vector & gate) { return decided && decided->open(gate); });
    plan_ptr plan(llama_steer_plan_new((int32_t) terms.size(), terms.data(), n_prompt > 0 ? positions[n_prompt - 1] : 0, &native));
    if (!plan) {
        throw server_steer_error(400, llama_steer_plan_error());
    }
    for (size_t i = n_prompt; i < tokens.size() && llama_steer_plan_tracks(plan.get()); ++i) {
        const std::string text = text_of(i);
        if (llama_steer_plan_feed(plan.get(), positions[i], text.data(), (int32_t) text.size()) < 0) {
            throw server_steer_error(400, llama_steer_plan_error());
        }
    }
    return plan;
}

// Let the context apply a slot's plan from a position on. A slot that was never steered has nothing to be told of an empty one.
void server_steer_slots::apply(int slot, slot_state & s, llama_pos from) {
    const llama_steer_segment * parts = nullptr;
    const int32_t n_parts = llama_steer_plan_segments(s.plan.get(), &parts);
    const size_t n_terms = s.request->terms.size();
    const bool acts = std::any_of(parts, parts + n_parts, [&](const llama_steer_segment & part) {
        return std::any_of(part.strengths, part.strengths + n_terms, [](double x) { return x != 0.0; });
    });
    if (!acts && !s.steered) {
        return;
    }
    check(llama_steer_plan_apply(ctx, s.plan.get(), slot, from));
    s.steered = ever_steered = true;
    note_memory();
}

void server_steer_slots::plan(const server_steer_request_ptr & request, server_tokens & tokens) {
    if (tokens.edits.planned) {
        return; // it was deferred, and nothing of it can have changed
    }
    tokens.edits.clear();
    tokens.edits.planned = true;
    if (!request || request->terms.empty() || tokens.empty() || !tokens.validate(ctx)) {
        return; // invalid tokens are refused when the slot is launched
    }
    const auto plan = make_plan(*request, tokens, nullptr);
    const auto positions = server_steer_positions(tokens);
    std::vector<uint64_t> ids(tokens.size());
    check(llama_steer_plan_edits(ctx, plan.get(), (int32_t) ids.size(), positions.data(), ids.data()));
    tokens.edits.ids = std::move(ids);
}

void server_steer_slots::launch(int slot, const server_steer_request_ptr & request, const server_tokens & tokens) {
    slots.at(slot) = std::make_unique<slot_state>();
    auto & s = *slots[slot];
    if (!request) {
        return;
    }
    s.request = request;
    store.note_start(*request);
    try {
        if (!tokens.empty()) {
            const size_t n_prompt = request->n_prompt >= 0 ? (size_t) request->n_prompt : tokens.size();
            s.last_pos = n_prompt > 0 ? server_steer_positions(tokens)[n_prompt - 1] : 0;
            s.plan = make_plan(*request, tokens, nullptr);
            apply(slot, s, 0);
        }
        if (request->special()) {
            s.values = std::make_shared<server_steer_values>();
            s.values->n_prompt = request->n_prompt;
        }
        set_gates(s, tokens);
        if (s.captures()) {
            set_captures(slot, s, tokens);
        }
        s.probe_all.resize(request->probes.size());
    } catch (...) {
        server_tokens none;
        release(slot, none);
        throw;
    }
}

llama_pos server_steer_slots::change(int slot, const server_steer_terms & terms, const server_tokens & done, server_tokens & input, bool fresh) {
    auto & s = *slots.at(slot);
    for (const auto & t : terms) {
        if (store.has_drafts() && t.has_phase()) {
            throw server_steer_error(400, "thinking and answer cannot be followed with speculative decoding: use response");
        }
        if (s.shifted && t.is_active()) {
            throw server_steer_error(400, "the context of this request was shifted, so '" + t.name + "' cannot act on it: use a larger context");
        }
        if (t.gate && t.is_active() && std::none_of(s.gates.begin(), s.gates.end(), [&](const server_steer_gate_state & g) { return g.same(*t.gate); })) {
            throw server_steer_error(400, "the gate of '" + t.name + "' was not decided on the prompt: a live change can use only gates that the request began with");
        }
    }
    auto request = std::make_shared<server_steer_request>(*s.request);
    request->terms = terms;

    const auto former = s.request;
    const llama_pos from = fresh ? 0 : done.pos_next();
    if (fresh) {
        auto next = make_plan(*request, input, &s);
        input.edits.planned = false;
        plan(request, input);
        s.request = request;
        std::swap(s.plan, next);
        try {
            apply(slot, s, 0);
        } catch (...) {
            s.request = former;
            std::swap(s.plan, next);
            input.edits.planned = false;
            plan(former, input);
            throw;
        }
    } else if (s.plan) {
        const auto is_open = [&](const server_steer_vector & gate) { return s.open(gate); };
        const auto specs = specs_of(request->terms, is_open);
        if (llama_steer_plan_change(s.plan.get(), from, (int32_t) specs.size(), specs.data()) < 0) {
            throw server_steer_error(400, llama_steer_plan_error());
        }
        s.request = request;
        try {
            apply(slot, s, from);
        } catch (...) {
            const auto back = specs_of(former->terms, is_open);
            llama_steer_plan_change(s.plan.get(), from, (int32_t) back.size(), back.data());
            s.request = former;
            throw;
        }
    }
    store.note_terms(*request);
    return from;
}

void server_steer_slots::decide(int slot, int32_t index, const server_tokens & tokens) {
    if (!holds_back(slot, index)) {
        return;
    }
    auto & s = *slots[slot];
    for (auto & g : s.gates) {
        if (g.next <= g.last) {
            throw server_steer_error(500, string_format("a gate waits for position %d, which was not read", g.next));
        }
        g.decide();
    }
    s.held_back = -1;
    s.plan = make_plan(*s.request, tokens, &s);
    apply(slot, s, index); // a position too: there are no images. What was computed keeps the ranges it was computed with
}

void server_steer_slots::check_decoded(int slot) {
    const auto * s = slots.at(slot).get();
    if (s && s->request && llama_steer_seq_error(ctx, slot) != LLAMA_STEER_OK) {
        throw server_steer_error(500, std::string("steering: ") + llama_steer_error(ctx));
    }
}

void server_steer_slots::on_token(int slot, llama_token token, llama_pos pos_next) {
    auto * s = slots.at(slot).get();
    if (!s || !s->request) {
        return;
    }
    if (!s->request->probes.empty()) {
        const auto it = s->probed.find(s->last_pos + s->n_sampled);
        s->probe_now.assign(s->request->probes.size(), 0.0);
        if (it != s->probed.end()) {
            size_t at = 0;
            for (size_t p = 0; p < s->probe_now.size(); ++p) {
                const size_t n = s->request->probes[p]->n();
                for (size_t i = 0; i < n; ++i) {
                    s->probe_now[p] += it->second[at++] / n;
                }
            }
            s->probed.erase(s->probed.begin(), std::next(it));
        }
        for (size_t i = 0; i < s->probe_now.size(); ++i) {
            s->probe_all[i].push_back(s->probe_now[i]);
        }
    }
    s->n_sampled++;
    if (s->request->named) {
        s->unsent.push_back(token);
    }
    store.note_token(*s->request);
    if (s->plan && llama_steer_plan_tracks(s->plan.get())) {
        const std::string text = common_token_to_piece(vocab, token, true);
        const int32_t changed = llama_steer_plan_feed(s->plan.get(), pos_next, text.data(), (int32_t) text.size());
        if (changed < 0) {
            throw server_steer_error(500, llama_steer_plan_error());
        }
        if (changed > 0) {
            apply(slot, *s, pos_next);
        }
    }
}

// ---- the life of a slot ----

bool server_steer_slots::shift(int slot) {
    auto * s = slots.at(slot).get();
    if (!s || !s->request) {
        return true;
    }
    const bool waits = std::any_of(s->request->terms.begin(), s->request->terms.end(), [](const server_steer_term & t) { return t.is_active(); });
    if (s->steered || waits || s->captures() || s->request->scores) {
        return false;
    }
    s->shifted = true;
    return true;
}

bool server_steer_slots::runs(int slot, const std::string & id) {
    const auto * s = slots.at(slot).get();
    return s && s->request && s->request->id == id && store.is_running(*s->request); // the client of another one with this id may have gone
}

void server_steer_slots::begin(int slot) {
    if (auto * s = slots.at(slot).get()) {
        s->begun = true;
    }
}

void server_steer_slots::copy(int from, int to) {
    if (slots.at(from) && slots.at(to)) {
        slots[to]->probed = slots[from]->probed;
    }
}

void server_steer_slots::release(int slot, server_tokens & tokens) {
    if (slot >= (int) slots.size() || !slots[slot]) {
        tokens.edits.ids.clear();
        return;
    }
    auto & s = *slots[slot];
    if (s.begun) {
        tokens.edits.ids.clear(); // else they are a former request's, and so are their ids
    }
    if (s.steered && s.begun) {
        const auto positions = server_steer_positions(tokens);
        std::vector<uint64_t> ids(positions.size());
        for (size_t i = 0; i < ids.size(); ++i) {
            ids[i] = llama_steer_edit_id(ctx, slot, positions[i]);
        }
        tokens.edits.ids = std::move(ids);
    }
    if (!s.request) {
        slots[slot].reset();
        return;
    }
    llama_steer_seq_clear(ctx, slot);
    store.note_end(*s.request);
    note_memory();
    const bool captured = s.captures();
    slots[slot].reset();

    const bool reading = std::any_of(slots.begin(), slots.end(), [](const auto & p) {
        return p && p->captures();
    });
    if (captured && !reading && many_rows && capture_bytes(captures.size(), all_streams, many_rows) > MAX_CAPTURE_BYTES) {
        llama_steer_capture_set(ctx, 0, nullptr, nullptr, LLAMA_STEER_STREAM_MEAN, 0, false);
        captures.clear();
        many_rows = all_streams = false;
    }
}

void server_steer_slots::note_memory() {
    llama_steer_stats stats = {};
    if (llama_steer_get_stats(ctx, &stats) == LLAMA_STEER_OK) {
        store.note_device(stats.n_device_bytes);
    }
}

// ---- the context ----

void server_steer_slots::attach(llama_context * ctx_new, int32_t n_slots) {
    detach();
    ctx = ctx_new;
    vocab = llama_model_get_vocab(llama_get_model(ctx));
    slots.resize(n_slots);
}

void server_steer_slots::detach() {
    // the context frees its own steering state
    slots.clear();
    captures.clear();
    all_streams = many_rows = ever_steered = false;
    ctx = nullptr;
    store.note_device(0);
}
