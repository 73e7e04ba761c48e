// server-steer-slots.cpp - what each slot gets: ranges of configs, phases of a response, and the rows that are read.

#include "server-steer.h"

#include "common.h"

#include <cmath>
#include <cstring>

namespace {

constexpr size_t IDLE_CONFIGS  = 8; // kept for the next request that wants the same
constexpr size_t IDLE_COLUMNS  = 4;
constexpr size_t MAX_TAP_BYTES = (size_t) 64 << 20; // larger buffers for reading are freed when nobody reads

// Position of each token; an image may take another number of positions than of tokens.
std::vector<llama_pos> positions_of(const server_tokens & tokens) {
    std::vector<llama_pos> res(tokens.size());
    llama_pos pos = 0;
    for (size_t i = 0; i < tokens.size();) {
        if (tokens[i] != LLAMA_TOKEN_NULL) {
            res[i++] = pos++;
            continue;
        }
        const auto & chunk = tokens.find_chunk(i);
        const size_t    n_tokens = mtmd_input_chunk_get_n_tokens(chunk.get());
        const llama_pos n_pos    = mtmd_input_chunk_get_n_pos(chunk.get());
        for (size_t k = 0; k < n_tokens; ++k) {
            res[i + k] = pos + ((size_t) n_pos == n_tokens ? (llama_pos) k : 0);
        }
        i   += n_tokens;
        pos += n_pos;
    }
    return res;
}

// Follows the text of a response through thinking and tool calls, by the template's own tags.
struct phase_tracker {
    const server_steer_tags * tags = nullptr;
    bool thinking = false;
    bool tool     = false;
    std::string tail; // text that could be the beginning of a tag

    // Anything to follow? Done for every steered request with tags: a live change may bring a scope that needs it.
    bool tracks() const {
        return !tags->open.empty() || !tags->close.empty() || !tags->tool_open.empty();
    }

    void start(const server_steer_tags & t) {
        *this = {};
        tags = &t;
        tool = t.all_tools;
    }

    void feed(const std::string & piece, bool response) {
        const size_t seen = tail.size();
        tail += piece;
        size_t best = 0; // end of the last tag that ends within the piece
        size_t longest = 0;
        const auto look = [&](const std::string & tag, bool & phase, bool value) {
            longest = std::max(longest, tag.size());
            const size_t at = tag.empty() ? std::string::npos : tail.rfind(tag);
            if (at != std::string::npos && at + tag.size() > seen && at + tag.size() >= best) {
                best  = at + tag.size();
                phase = value;
            }
        };
        look(tags->open, thinking, true);
        for (const auto & tag : tags->close) {
            look(tag, thinking, false);
        }
        if (response && !tags->all_tools) {
            best = 0;
            for (const auto & tag : tags->tool_open) {
                look(tag, tool, true);
            }
            for (const auto & tag : tags->tool_close) {
                look(tag, tool, false);
            }
        }
        if (tail.size() > longest) {
            tail.erase(0, tail.size() - longest);
        }
    }
};

} // namespace

// Tokens first <= p < end (end < 0: no end) have the terms of `active`, at the strengths they have where response token n is decided.
struct server_steer::segment {
    llama_pos first;
    llama_pos end;
    uint64_t  active;
    int32_t   n;
};

// A gate of a slot: the sum of the states it looks at, until it is decided.
struct gate_state {
    server_steer_vector_ptr gate;
    llama_pos first = 0; // positions it looks at, both included
    llama_pos last  = 0;
    llama_pos next  = 0; // the next of them; a decode may be repeated
    std::vector<double> sum; // [n_embd]
    bool   decided = false;
    double score   = 0.0;

    bool same(const server_steer_vector & other) const {
        return gate->content_sha256 == other.content_sha256 && gate->gate->mean == other.gate->mean;
    }

    void add(llama_pos pos, const float * row) {
        if (pos == next && pos <= last) {
            for (size_t i = 0; i < sum.size(); ++i) {
                sum[i] += row[i];
            }
            next++;
        }
    }

    // the cosine between what was read and the condition vector
    void decide() {
        double dot = 0.0, h2 = 0.0, v2 = 0.0;
        for (size_t i = 0; i < sum.size(); ++i) {
            const double v = gate->dirs[i];
            dot += sum[i]*v;
            h2  += sum[i]*sum[i];
            v2  += v*v;
        }
        score   = h2*v2 > 0.0 ? dot/std::sqrt(h2*v2) : 0.0;
        decided = true;
    }
};

struct server_steer::slot_state {
    server_steer_request_ptr request; // null: the slot is not ours
    server_steer_terms terms;         // of the request, until a live change replaces them
    llama_pos     last_pos = 0;       // of the prompt
    phase_tracker phases;
    uint64_t      active = 0;         // terms at the next token
    std::set<std::string> held;       // configs that its ranges name
    bool steered = false;
    bool begun   = false;             // the tokens in its cache are those of this request
    bool shifted = false;             // positions no longer say where in the text a token is

    std::vector<gate_state> gates;
    int32_t held_back = -1;           // index of the token that waits for them

    // reading
    std::vector<llama_pos> wanted;    // sorted
    int32_t first_wanted = -1;        // token index
    std::set<std::pair<int32_t, llama_pos>> seen; // (layer, position): a decode may be repeated
    std::vector<double> sums;
    std::shared_ptr<server_steer_values> values;

    int32_t n_sampled = 0;
    bool    id_sent   = false;
    llama_tokens unsent;              // tokens that no chunk has carried yet
    std::map<llama_pos, std::vector<double>> probed; // projections on the directions of all probes, one after the other
    std::vector<double> probe_now;                   // of the token sampled last
    std::vector<std::vector<double>> probe_all;

    bool reads() const { return request && request->read; }

    bool taps() const { return request && (request->read || !request->probes.empty() || !gates.empty()); }

    bool open(const server_steer_vector & gate) const {
        for (const auto & g : gates) {
            if (g.decided && g.same(gate)) {
                return gate.gate->above ? g.score > gate.gate->threshold : g.score < gate.gate->threshold;
            }
        }
        return false;
    }

    llama_pos response_start() const { return std::max(1, last_pos); }

    // Terms that act at a position, in the present phase.
    uint64_t active_at(llama_pos pos) const {
        const bool response = pos >= response_start();
        uint64_t res = 0;
        for (size_t i = 0; i < terms.size(); ++i) {
            const auto & t = terms[i];
            bool acts = false;
            switch (t.scope) {
                case server_steer_term::ALL:      acts = pos >= 1; break;
                case server_steer_term::PROMPT:   acts = pos >= 1 && !response; break;
                case server_steer_term::RESPONSE: acts = response; break;
                case server_steer_term::THINKING: acts = response && phases.thinking; break;
                case server_steer_term::ANSWER:   acts = response && !phases.thinking && !phases.tool; break;
                case server_steer_term::RANGE:    acts = pos >= t.first && (t.last < 0 || pos <= t.last); break;
            }
            acts = acts && (!t.gate || open(*t.gate));
            res |= acts && t.strength != 0.0 ? 1ull << i : 0;
        }
        return res;
    }

    // What the tokens from a position on get, in the present phase.
    std::vector<segment> from(llama_pos pos) const {
        std::set<llama_pos> edges = { pos, 1, response_start() };
        for (const auto & t : terms) {
            for (int32_t n = t.schedule.over; n >= 1 && response_start() + n >= pos; --n) {
                edges.insert(response_start() + n);
            }
            if (t.scope == server_steer_term::RANGE) {
                edges.insert(t.first);
                edges.insert(t.last < 0 ? t.first : t.last + 1);
            }
        }
        std::vector<segment> res;
        for (llama_pos edge : edges) {
            if (edge < pos) {
                continue;
            }
            if (!res.empty()) {
                res.back().end = edge;
            }
            res.push_back({ edge, -1, active_at(edge), std::max(0, edge - response_start()) });
        }
        return res;
    }
};

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
        llama_steer_column_clear(ctx, found->second.id);
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
        check(llama_steer_column_set(ctx, id, (int32_t) vector->n(), vector->layers.data(), vector->sites.data(), vector->dirs.data(), vector->scales.data()));
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
    const auto positions = positions_of(tokens);
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
    const auto positions = positions_of(tokens);
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
        if (t.gate && t.strength != 0.0 && std::none_of(s.gates.begin(), s.gates.end(), [&](const gate_state & g) { return g.same(*t.gate); })) {
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
        const auto positions = positions_of(tokens);
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
            llama_steer_tap_set(ctx, 0, nullptr, nullptr, LLAMA_STEER_STREAM_MEAN, 0, false);
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

// ---- reading ----

int server_steer::reuse_limit(int slot, int n_past) const {
    const auto * s = slots.at(slot).get();
    return s && s->first_wanted >= 0 ? std::min(n_past, s->first_wanted) : n_past;
}

bool server_steer::can_shift(int slot, const server_tokens & cached, const server_tokens & wanted) const {
    return !cached.edits.any() && !wanted.edits.any() && reuse_limit(slot, INT32_MAX) == INT32_MAX;
}

void server_steer::set_taps(int slot, slot_state & s, const server_tokens & tokens) {
    std::set<std::pair<int32_t, int32_t>> need;
    bool all_streams = false;
    bool many_rows   = drafts;
    const auto positions = positions_of(tokens);

    if (s.request->read) {
        const auto & spec = *s.request->read;
        const size_t n = tokens.size();
        const size_t n_prompt = s.request->n_prompt >= 0 ? (size_t) s.request->n_prompt : n;
        std::set<size_t> rows; // token indices
        switch (spec.kind) {
            case server_steer_read_spec::LAST: rows.insert(n - 1); break;
            case server_steer_read_spec::ALL:
            case server_steer_read_spec::MEAN:
                for (size_t i = spec.kind == server_steer_read_spec::ALL ? 0 : 1; i < n; ++i) {
                    rows.insert(i);
                }
                break;
            case server_steer_read_spec::RESPONSE:
            case server_steer_read_spec::RESPONSE_MEAN:
                for (size_t i = n_prompt; i < n; ++i) {
                    rows.insert(i);
                }
                break;
            case server_steer_read_spec::LIST:
                for (int64_t p : spec.list) {
                    p += p < 0 ? (int64_t) n : 0;
                    if (p < 0 || p >= (int64_t) n) {
                        throw server_steer_error(400, string_format("the positions do not all lie in a text of %zu tokens", n));
                    }
                    rows.insert((size_t) p);
                }
                break;
        }
        if (rows.empty()) {
            throw server_steer_error(400, spec.is_mean() && spec.kind == server_steer_read_spec::MEAN
                ? "a mean needs at least two tokens, as position 0 is left out" : "there is no response to read: the text ends with the prompt");
        }
        for (size_t i : rows) {
            s.wanted.push_back(positions[i]);
        }
        s.first_wanted = s.first_wanted < 0 ? (int32_t) *rows.begin() : std::min(s.first_wanted, (int32_t) *rows.begin());
        s.values->tokens = tokens.get_text_tokens();
        const size_t n_out = spec.streams ? info.n_streams : 1;
        const size_t width = n_out*info.n_embd;
        const size_t n_rows = spec.is_mean() ? 1 : s.wanted.size();
        s.values->positions.assign(s.wanted.begin(), s.wanted.end());
        if (spec.is_mean()) {
            s.values->positions = { s.wanted.back() };
            s.sums.assign(spec.layers.size()*width, 0.0);
        }
        s.values->values.assign(spec.layers.size()*n_rows*width, 0.0f);
        for (int32_t il : spec.layers) {
            need.insert({ il, spec.site });
        }
        all_streams = spec.streams;
        many_rows   = many_rows || s.wanted.size() > 1;
    }
    for (const auto & g : s.gates) {
        need.insert({ g.gate->layers[0], g.gate->sites[0] });
        many_rows = many_rows || g.first < g.last;
    }
    for (const auto & probe : s.request->probes) {
        for (size_t i = 0; i < probe->n(); ++i) {
            need.insert({ probe->layers[i], probe->sites[i] });
        }
    }

    const bool others = std::any_of(slots.begin(), slots.end(), [&](const auto & p) {
        return p && p.get() != &s && p->taps();
    });
    const bool enough = std::includes(taps.begin(), taps.end(), need.begin(), need.end()) &&
        (taps_all_streams || !all_streams) && (taps_many_rows || !many_rows);
    if (!enough) {
        auto next = need;
        if (others) {
            next.insert(taps.begin(), taps.end());
            all_streams = all_streams || taps_all_streams;
            many_rows   = many_rows   || taps_many_rows;
        }
        std::vector<int32_t> layers;
        std::vector<int32_t> sites;
        for (const auto & [il, site] : next) {
            layers.push_back(il);
            sites.push_back(site);
        }
        check(llama_steer_tap_set(ctx, (int32_t) layers.size(), layers.data(), sites.data(),
            all_streams ? LLAMA_STEER_STREAM_ALL : LLAMA_STEER_STREAM_MEAN, many_rows ? 0 : (int32_t) slots.size(), false));
        taps = next;
        taps_all_streams = all_streams;
        taps_many_rows   = many_rows;
        check(llama_steer_set_read_callback(ctx, [](const llama_steer_rows * rows, void * self) {
            return static_cast<server_steer *>(self)->on_rows(*rows);
        }, this));
    }
    // runs of wanted positions
    for (size_t i = 0; i < s.wanted.size();) {
        size_t k = i + 1;
        while (k < s.wanted.size() && s.wanted[k] == s.wanted[k - 1] + 1) {
            k++;
        }
        check(llama_steer_tap_range(ctx, slot, s.wanted[i], s.wanted[k - 1] + 1, true));
        i = k;
    }
    for (const auto & g : s.gates) {
        check(llama_steer_tap_range(ctx, slot, g.first, g.last + 1, true));
    }
    if (!s.request->probes.empty()) {
        check(llama_steer_tap_range(ctx, slot, s.last_pos, -1, true));
    }
}

// ---- gates ----

void server_steer::set_gates(slot_state & s, const server_tokens & tokens) {
    for (const auto & t : s.terms) {
        if (!t.gate || t.strength == 0.0 || std::any_of(s.gates.begin(), s.gates.end(), [&](const gate_state & g) { return g.same(*t.gate); })) {
            continue;
        }
        const int32_t n_prompt = s.request->n_prompt >= 0 ? s.request->n_prompt : (int32_t) tokens.size();
        if (n_prompt < 3) {
            throw server_steer_error(400, string_format("a gate is decided on a prompt of at least 3 tokens, this one has %d", n_prompt));
        }
        if (tokens.has_mtmd) {
            throw server_steer_error(400, "a gate cannot be decided on a prompt with images or sound");
        }
        gate_state g;
        g.gate  = t.gate;
        g.last  = n_prompt - 2;
        g.first = g.next = t.gate->gate->mean ? 1 : g.last;
        g.sum.assign(info.n_embd, 0.0);
        s.gates.push_back(g);
        s.held_back    = n_prompt - 1;
        s.first_wanted = s.first_wanted < 0 ? g.first : std::min(s.first_wanted, g.first);
    }
}

bool server_steer::holds_back(int slot, int32_t index) const {
    const auto * s = slots.at(slot).get();
    return s && s->held_back >= 0 && index == s->held_back;
}

void server_steer::decide(int slot, int32_t index, const server_tokens & tokens) {
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
    std::vector<segment> rest; // what was computed keeps the ranges it was computed with
    for (auto part : segments(*s.request, tokens, s)) {
        part.first = std::max(part.first, index); // a position too: there are no images
        if (part.end < 0 || part.end > part.first) {
            rest.push_back(part);
        }
    }
    set_ranges(slot, s, rest);
}

bool server_steer::on_rows(const llama_steer_rows & rows) {
    const size_t n_embd = rows.n_embd;
    std::vector<float> mean(n_embd);
    const auto averaged = [&](const float * row) {
        if (rows.n_streams == 1) {
            return row;
        }
        // in the order and precision of the graph's own mean
        for (size_t i = 0; i < n_embd; ++i) {
            float sum = row[i];
            for (int32_t k = 1; k < rows.n_streams; ++k) {
                sum += row[k*n_embd + i];
            }
            mean[i] = sum*(1.0f/rows.n_streams);
        }
        return (const float *) mean.data();
    };
    for (int32_t r = 0; r < rows.n_rows; ++r) {
        const int32_t seq = rows.seq_id[r];
        if (seq < 0 || seq >= (int32_t) slots.size() || !slots[seq] || !slots[seq]->request) {
            continue;
        }
        auto & s = *slots[seq];
        const llama_pos pos = rows.pos[r];
        const float * row = rows.data + (size_t) r*rows.n_streams*n_embd;

        if (s.reads() && s.request->read->site == rows.site) {
            const auto & spec  = *s.request->read;
            const auto   layer = std::lower_bound(spec.layers.begin(), spec.layers.end(), rows.layer);
            const auto   at    = std::lower_bound(s.wanted.begin(), s.wanted.end(), pos);
            if (layer != spec.layers.end() && *layer == rows.layer && at != s.wanted.end() && *at == pos && s.seen.insert({ rows.layer, pos }).second) {
                const size_t n_out = spec.streams ? info.n_streams : 1;
                const size_t width = n_out*n_embd;
                const float * src  = n_out == 1 ? averaged(row) : row;
                const size_t li = layer - spec.layers.begin();
                if (spec.is_mean()) {
                    for (size_t i = 0; i < width; ++i) {
                        s.sums[li*width + i] += src[i];
                    }
                } else {
                    std::copy_n(src, width, s.values->values.begin() + (li*s.wanted.size() + (at - s.wanted.begin()))*width);
                }
            }
        }
        for (auto & g : s.gates) {
            if (g.gate->layers[0] == rows.layer && g.gate->sites[0] == rows.site) {
                g.add(pos, averaged(row));
            }
        }
        size_t n_dirs = 0;
        for (const auto & probe : s.request->probes) {
            n_dirs += probe->n();
        }
        size_t index = 0; // of the direction, among those of all probes
        for (const auto & pointer : s.request->probes) {
            const auto & probe = *pointer;
            for (size_t i = 0; i < probe.n(); ++i, ++index) {
                if (probe.layers[i] != rows.layer || probe.sites[i] != rows.site) {
                    continue;
                }
                const float * src = averaged(row);
                double dot = 0.0;
                for (size_t k = 0; k < n_embd; ++k) {
                    dot += (double) src[k]*probe.dirs[i*n_embd + k];
                }
                // a position may be computed again with another token: a draft that was turned down
                auto & values = s.probed[pos];
                values.resize(n_dirs, 0.0);
                values[index] = probe.scales[i] != 0.0 ? dot/std::abs(probe.scales[i]) : dot;
            }
        }
    }
    return true;
}

bool server_steer::ends_at_prompt(int slot) const {
    const auto * s = slots.at(slot).get();
    return s && s->reads();
}

bool server_steer::forces(int slot) const {
    const auto * s = slots.at(slot).get();
    return s && s->request && s->request->scores;
}

llama_token server_steer::force(int slot, const float * logits, int32_t n_vocab, llama_token sampled) {
    auto & s = *slots.at(slot);
    const auto & forced = s.request->forced;
    if ((size_t) s.n_sampled >= forced.size()) {
        return sampled;
    }
    const llama_token token = forced[s.n_sampled];
    const float top = *std::max_element(logits, logits + n_vocab);
    double sum = 0.0;
    for (int32_t i = 0; i < n_vocab; ++i) {
        sum += std::exp(logits[i] - top);
    }
    s.values->logprobs.push_back((double) logits[token] - top - std::log(sum));
    return token;
}

std::shared_ptr<server_steer_values> server_steer::take_values(int slot) {
    auto * s = slots.at(slot).get();
    if (!s || !s->values) {
        return nullptr;
    }
    if (s->reads() && s->request->read->is_mean()) {
        for (size_t i = 0; i < s->sums.size(); ++i) {
            s->values->values[i] = (float) (s->sums[i]/(double) s->wanted.size());
        }
    }
    return std::move(s->values);
}

// ---- answers ----

json server_steer::extra(int slot, part_t part) {
    auto * s = slots.at(slot).get();
    if (!s || !s->request || !s->request->named) {
        return json(nullptr);
    }
    json res = json::object();
    if (part == WHOLE || !s->id_sent) {
        res["request_id"] = s->request->id;
        s->id_sent = true;
    }
    if (part != WHOLE) {
        // the stock server sends no chunk for a token that ends inside a character, and forgets its id
        res["tokens"] = s->unsent;
        s->unsent.clear();
    }
    if (!s->request->probes.empty() && part != STREAM_END) {
        json probe = json::object();
        for (size_t i = 0; i < s->request->probes.size(); ++i) {
            if (part == WHOLE) {
                probe[s->request->probe_names[i]] = s->probe_all[i];
            } else {
                probe[s->request->probe_names[i]] = i < s->probe_now.size() ? s->probe_now[i] : 0.0;
            }
        }
        res["steering_probe"] = probe;
    }
    return res;
}

void server_steer::merge(json & answer, const json & extra) {
    if (extra.is_null() || answer.is_null()) {
        return;
    }
    json * target = &answer;
    if (answer.is_array()) {
        if (answer.empty()) {
            return;
        }
        target = &answer.at((size_t) 0);
    }
    if (!target->is_object() || target->contains("event")) {
        return; // the events of other APIs have a fixed form
    }
    for (const auto & entry : extra.items()) {
        if (entry.key() != "tokens" || target->contains("tokens")) {
            (*target)[entry.key()] = entry.value();
        }
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
