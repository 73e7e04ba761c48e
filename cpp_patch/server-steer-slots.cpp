// server-steer-slots.cpp - the life of a slot: configs and columns on the device, ranges of positions, phases, live changes.

#include "server-steer-state.h"

#include "common.h"

#include <cstring>

namespace {

constexpr size_t IDLE_CONFIGS  = 8; // kept for the next request that wants the same
constexpr size_t IDLE_COLUMNS  = 4;
constexpr size_t MAX_TAP_BYTES = (size_t) 64 << 20; // larger buffers for reading are freed when nobody reads

} // namespace

server_steer::server_steer()  = default;
server_steer::~server_steer() = default;

void server_steer::check(int32_t status) const {
    if (status == LLAMA_STEER_OK) {
        return;
    }
    const int code = status == LLAMA_STEER_ERR_LIMIT || status == LLAMA_STEER_ERR_MEMORY ? 503 : 400;
    throw server_steer_error(code, std::string("steering: ") + llama_steer_error(ctx));
}

// ---- configs and columns ----

void server_steer::purge(size_t keep_configs, size_t keep_columns) {
    const auto surplus = [](auto & map, size_t keep) { // what nobody uses, beyond the `keep` that were used last
        std::vector<decltype(map.begin())> idle;
        for (auto it = map.begin(); it != map.end(); ++it) {
            if (it->second.refs == 0) {
                idle.push_back(it);
            }
        }
        std::sort(idle.begin(), idle.end(), [](const auto & a, const auto & b) { return a->second.last < b->second.last; });
        idle.resize(idle.size() - std::min(idle.size(), keep));
        return idle;
    };
    for (const auto & found : surplus(configs, keep_configs)) {
        llama_steer_config_clear(ctx, found->second.id);
        for (const auto & column : found->second.columns) {
            columns[column].refs--;
        }
        configs.erase(found);
    }
    for (const auto & found : surplus(columns, keep_columns)) {
        llama_steer_vector_clear(ctx, found->second.id);
        columns.erase(found);
    }
}

int32_t server_steer::column_for(const server_steer_vector_ptr & vector) {
    auto it = columns.find(vector->content_sha256);
    if (it == columns.end()) {
        std::set<int32_t> used;
        for (const auto & [_, c] : columns) {
            used.insert(c.id);
        }
        int32_t id = 0;
        while (used.count(id)) {
            id++;
        }
        check(llama_steer_vector_set(ctx, id, (int32_t) vector->n(), vector->layers.data(), vector->sites.data(), vector->dirs.data(), vector->scales.data()));
        it = columns.emplace(vector->content_sha256, column_use()).first;
        it->second.id = id;
    }
    it->second.last = ++clock;
    return it->second.id;
}

// The key of the config that applies the active terms; empty: there is nothing to apply.
const std::string & server_steer::config_for(const server_steer_terms & terms, const segment & part) {
    std::string key;
    for (size_t i = 0; i < terms.size(); ++i) {
        const auto & t = terms[i];
        const double strength = t.strength_at(part.n);
        if ((part.active >> i & 1) && strength != 0.0) {
            uint64_t bits;
            memcpy(&bits, &strength, sizeof(bits));
            key += string_format("%s %d %016llx %d %d %d;", t.vector->content_sha256.c_str(), t.op, (unsigned long long) bits, t.il_first, t.il_last, t.stream);
        }
    }
    if (key.empty()) {
        return no_config;
    }
    auto it = configs.find(key);
    if (it == configs.end()) {
        purge(IDLE_CONFIGS, IDLE_COLUMNS);
        for (int attempt = 0;; ++attempt) {
            try {
                config_use use;
                std::vector<llama_steer_term> natives;
                for (size_t i = 0; i < terms.size(); ++i) {
                    const auto & t = terms[i];
                    const double strength = t.strength_at(part.n);
                    if ((part.active >> i & 1) && strength != 0.0) {
                        natives.push_back({ column_for(t.vector), t.op, strength, t.il_first, t.il_last, t.stream });
                        use.columns.push_back(t.vector->content_sha256);
                    }
                }
                use.id = next_config;
                check(llama_steer_config_set(ctx, use.id, (int32_t) natives.size(), natives.data()));
                next_config++;
                for (const auto & column : use.columns) {
                    columns[column].refs++;
                }
                it = configs.emplace(key, use).first;
                break;
            } catch (const server_steer_error & e) {
                if (attempt > 0 || e.code != 503) {
                    throw;
                }
                purge(0, 0); // what is idle makes room
            }
        }
    }
    it->second.last = ++clock;
    return it->first;
}

// ---- ranges ----

// Segments of all tokens of a task, and the phase at its end.
std::vector<server_steer::segment> server_steer::segments(const server_steer_request & request, const server_tokens & tokens, slot_state & s) {
    const auto positions = server_steer_positions(tokens);
    const size_t n_prompt = request.n_prompt >= 0 ? (size_t) request.n_prompt : tokens.size();
    s.terms    = request.terms;
    s.last_pos = n_prompt > 0 ? positions[n_prompt - 1] : 0;
    s.phases.start(request.tags);

    const auto & tags = request.tags;
    const bool phased = s.phases.tracks();
    if (phased) {
        if (!tags.generation_prompt.empty()) {
            s.phases.feed(tags.generation_prompt, false);
            // a template that opens thinking without a tag
            if (tags.open.empty() && !tags.close.empty()) {
                s.phases.thinking = std::none_of(tags.close.begin(), tags.close.end(), [&](const std::string & tag) {
                    return tags.generation_prompt.find(tag) != std::string::npos;
                });
            }
        } else {
            for (size_t i = 0; i < n_prompt; ++i) {
                if (tokens[i] != LLAMA_TOKEN_NULL) {
                    s.phases.feed(common_token_to_piece(vocab, tokens[i], true), false);
                }
            }
        }
    }
    auto res = s.from(0);
    for (size_t i = n_prompt; phased && i < tokens.size(); ++i) { // a response that is given
        const bool thinking = s.phases.thinking;
        const bool tool     = s.phases.tool;
        s.phases.feed(common_token_to_piece(vocab, tokens[i], true), true);
        if (thinking == s.phases.thinking && tool == s.phases.tool) {
            continue;
        }
        while (!res.empty() && res.back().first >= positions[i]) {
            res.pop_back();
        }
        if (!res.empty()) {
            res.back().end = positions[i];
        }
        for (const auto & next : s.from(positions[i])) {
            res.push_back(next);
        }
    }
    s.active = res.back().active;
    return res;
}

void server_steer::plan(const server_steer_request_ptr & request, server_tokens & tokens) {
    tokens.edits.clear();
    if (!request || request->terms.empty() || tokens.empty() || !tokens.validate(ctx)) {
        return; // invalid tokens are refused when the slot is launched
    }
    slot_state s;
    const auto parts = segments(*request, tokens, s);
    const auto positions = server_steer_positions(tokens);
    std::vector<uint64_t> ids(tokens.size());
    size_t i = 0;
    for (const auto & part : parts) {
        if (i == ids.size()) {
            break; // the rest is the launch's
        }
        const auto & key = config_for(s.terms, part);
        const uint64_t id = key.empty() ? 0 : llama_steer_config_id(ctx, configs.at(key).id);
        for (; i < ids.size() && (part.end < 0 || positions[i] < part.end); ++i) {
            ids[i] = id;
        }
    }
    tokens.edits.ids = std::move(ids);
}

void server_steer::set_ranges(int slot, slot_state & s, const std::vector<segment> & parts) {
    // all configs first: what cannot be had must not leave half of it behind
    std::vector<int32_t> ids;
    for (const auto & part : parts) {
        const auto & key = config_for(s.terms, part);
        int32_t id = 0;
        if (!key.empty()) {
            auto & use = configs.at(key);
            id = use.id;
            if (s.held.insert(key).second) {
                use.refs++;
            }
            s.steered = ever_steered = true;
        }
        ids.push_back(id);
    }
    if (!s.steered) {
        return;
    }
    for (size_t i = 0; i < parts.size(); ++i) {
        check(llama_steer_range(ctx, slot, parts[i].first, parts[i].end, ids[i]));
    }
}

void server_steer::launch(int slot, const server_steer_request_ptr & request, const server_tokens & tokens) {
    slots.at(slot) = std::make_unique<slot_state>();
    auto & s = *slots[slot];
    if (!request) {
        return;
    }
    s.request = request;
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (auto * entry = entry_of(*request)) {
            entry->started = true;
            entry->n_slots++;
        }
    }
    try {
        if (!tokens.empty()) {
            set_ranges(slot, s, segments(*request, tokens, s));
        }
        if (request->special()) {
            s.values = std::make_shared<server_steer_values>();
            s.values->n_prompt = request->n_prompt;
        }
        set_gates(s, tokens);
        if (s.taps()) {
            set_taps(slot, s, tokens);
        }
        s.probe_all.resize(request->probes.size());
    } catch (...) {
        server_tokens none;
        release(slot, none);
        throw;
    }
}

llama_pos server_steer::change(int slot, const server_steer_terms & terms, const server_tokens & done, server_tokens & input, bool fresh) {
    auto & s = *slots.at(slot);
    check_phases(terms, s.request->tags);
    for (const auto & t : terms) {
        if (s.shifted && t.strength != 0.0) {
            throw server_steer_error(400, "the context of this request was shifted, so '" + t.name + "' cannot act on it: use a larger context");
        }
        if (t.gate && t.strength != 0.0 && std::none_of(s.gates.begin(), s.gates.end(), [&](const server_steer_gate_state & g) { return g.same(*t.gate); })) {
            throw server_steer_error(400, "the gate of '" + t.name + "' was not decided on the prompt: a live change can use only gates that the request began with");
        }
    }
    auto request = std::make_shared<server_steer_request>(*s.request);
    request->terms = terms;

    const auto former = s.terms;
    const llama_pos from = fresh ? 0 : done.pos_next();
    try {
        if (fresh) {
            plan(request, input);
            set_ranges(slot, s, segments(*request, input, s));
        } else {
            s.terms = terms;
            set_ranges(slot, s, s.from(from));
        }
    } catch (...) {
        s.terms = former;
        throw;
    }
    s.request = request;
    s.phases.tags = &s.request->tags;
    s.active  = s.active_at(from);
    std::lock_guard<std::mutex> lock(mutex);
    if (auto * entry = entry_of(*request)) {
        entry->steering = json::array();
        for (const auto & term : terms) {
            entry->steering.push_back(term.given);
        }
    }
    return from;
}

// The first time a config is used, each place it names must have fired: a silent no-op is the worst failure of steering.
void server_steer::prove(slot_state & s) {
    const uint64_t active = s.active_at(s.last_pos);
    const auto it = configs.find(config_for(s.terms, { s.last_pos, -1, active, 0 }));
    if (it == configs.end() || it->second.proved) {
        return;
    }
    for (size_t i = 0; i < s.terms.size(); ++i) {
        const auto & t = s.terms[i];
        for (size_t k = 0; (active >> i & 1) && k < t.vector->n(); ++k) {
            const int32_t il   = t.vector->layers[k];
            const int32_t site = t.vector->sites[k];
            const bool inside  = il >= t.il_first && (t.il_last < 0 || il <= t.il_last);
            if (inside && llama_steer_config_acts(ctx, it->second.id, il, site) && llama_steer_fired(ctx, il, site) == 0) {
                throw server_steer_error(500, string_format("steering was asked for at layer %d, but this model never passed through that hook: "
                            "leave the layer out, and please report the architecture", il));
            }
        }
    }
    it->second.proved = true;
}

void server_steer::on_token(int slot, llama_token token, llama_pos pos_next) {
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
                    s->probe_now[p] += it->second[at++]/n;
                }
            }
            s->probed.erase(s->probed.begin(), std::next(it));
        }
        for (size_t i = 0; i < s->probe_now.size(); ++i) {
            s->probe_all[i].push_back(s->probe_now[i]);
        }
    }
    if (s->n_sampled == 0 && s->steered) {
        prove(*s);
    }
    s->n_sampled++;
    if (s->request->named) {
        s->unsent.push_back(token);
    }
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (auto * entry = entry_of(*s->request)) {
            entry->n_tokens++;
        }
    }
    if (!s->phases.tracks()) {
        return;
    }
    s->phases.feed(common_token_to_piece(vocab, token, true), true);
    const uint64_t active = s->active_at(pos_next);
    if (active != s->active) {
        set_ranges(slot, *s, s->from(pos_next));
        s->active = active;
    }
}

bool server_steer::shift(int slot) {
    auto * s = slots.at(slot).get();
    if (!s || !s->request) {
        return true;
    }
    const bool waits = std::any_of(s->terms.begin(), s->terms.end(), [](const server_steer_term & t) { return t.strength != 0.0; });
    if (s->steered || waits || s->taps()) {
        return false;
    }
    s->shifted = true;
    return true;
}

bool server_steer::runs(int slot, const std::string & id) {
    const auto * s = slots.at(slot).get();
    if (!s || !s->request || s->request->id != id) {
        return false;
    }
    std::lock_guard<std::mutex> lock(mutex);
    return entry_of(*s->request) != nullptr; // the client of another one with this id may have gone
}

void server_steer::begin(int slot) {
    if (auto * s = slots.at(slot).get()) {
        s->begun = true;
    }
}

void server_steer::copy(int from, int to) {
    if (slots.at(from) && slots.at(to)) {
        slots[to]->probed = slots[from]->probed;
    }
}

void server_steer::release(int slot, server_tokens & tokens) {
    if (slot >= (int) slots.size() || !slots[slot]) {
        tokens.edits.clear();
        return;
    }
    auto & s = *slots[slot];
    if (s.begun) {
        tokens.edits.clear(); // else they are a former request's, and so are their ids
    }
    if (s.steered && s.begun) {
        const auto positions = server_steer_positions(tokens);
        std::vector<uint64_t> ids(positions.size());
        for (size_t i = 0; i < ids.size(); ++i) {
            ids[i] = llama_steer_edit_id(ctx, slot, positions[i]);
        }
        tokens.edits.ids = std::move(ids);
    }
    if (s.request) {
        llama_steer_seq_clear(ctx, slot);
        for (const auto & key : s.held) {
            configs.at(key).refs--;
        }
        purge(IDLE_CONFIGS, IDLE_COLUMNS);
        std::lock_guard<std::mutex> lock(mutex);
        if (auto * entry = entry_of(*s.request)) {
            entry->n_slots--;
        }
    } else {
        slots[slot].reset();
        return;
    }
    note_memory();
    const bool used_taps = s.taps();
    slots[slot].reset();

    const bool reading = std::any_of(slots.begin(), slots.end(), [](const auto & p) {
        return p && p->taps();
    });
    if (used_taps && !reading && taps_many_rows) {
        const size_t bytes = taps.size()*llama_n_ubatch(ctx)*(size_t) info.n_embd*sizeof(float)*(taps_all_streams ? info.n_streams : 1);
        if (bytes > MAX_TAP_BYTES) {
            llama_steer_capture_set(ctx, 0, nullptr, nullptr, LLAMA_STEER_STREAM_MEAN, 0, false);
            taps.clear();
            taps_many_rows = taps_all_streams = false;
        }
    }
}

void server_steer::note_memory() {
    llama_steer_stats stats = {};
    if (llama_steer_get_stats(ctx, &stats) == LLAMA_STEER_OK) {
        std::lock_guard<std::mutex> lock(mutex);
        device_bytes = stats.n_device_bytes;
    }
}

// ---- the context ----

bool server_steer::attach(llama_model * model_new, llama_context * ctx_new, const std::string & path, int32_t n_slots, bool drafts_new) {
    model  = model_new;
    ctx    = ctx_new;
    vocab  = llama_model_get_vocab(model);
    drafts = drafts_new;
    slots.clear();
    slots.resize(n_slots);
    configs.clear();
    columns.clear();
    next_config = 1;
    taps.clear();
    taps_all_streams = taps_many_rows = ever_steered = false;

    if (ready) {
        return true; // resumed from sleep: names and vectors are as they were
    }
    try {
        const bool known = llama_steer_model_info(model, &info) == LLAMA_STEER_OK;
        identity = server_steer_identity_of(path, info.n_layer, info.n_embd, info.n_streams);
        if (!known) {
            unsupported = "models of the architecture '" + identity.architecture + "' cannot be steered: it is not in the tested list";
        }
    } catch (const std::exception & e) {
        unsupported = std::string("this model cannot be steered: ") + e.what();
        SRV_WRN("%s\n", unsupported.c_str());
    }
    try {
        load_configured();
    } catch (const std::exception & e) {
        SRV_ERR("steering: %s\n", e.what());
        return false;
    }
    ready = true;
    return true;
}

void server_steer::detach() {
    // the context frees its own steering state
    slots.clear();
    configs.clear();
    columns.clear();
    taps.clear();
    ctx   = nullptr;
    model = nullptr;
}
