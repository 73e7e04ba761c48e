// server-steer-read.cpp - hidden states that pass by: reads, gates, probes and scores, and what an answer carries of them.

#include "server-steer-state.h"

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
    const auto positions = server_steer_positions(tokens);

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
        check(llama_steer_capture_set(ctx, (int32_t) layers.size(), layers.data(), sites.data(),
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
        check(llama_steer_capture_range(ctx, slot, s.wanted[i], s.wanted[k - 1] + 1, true));
        i = k;
    }
    for (const auto & g : s.gates) {
        check(llama_steer_capture_range(ctx, slot, g.first, g.last + 1, true));
    }
    if (!s.request->probes.empty()) {
        check(llama_steer_capture_range(ctx, slot, s.last_pos, -1, true));
    }
}

// ---- gates ----

void server_steer::set_gates(slot_state & s, const server_tokens & tokens) {
    for (const auto & t : s.terms) {
        if (!t.gate || t.strength == 0.0 || std::any_of(s.gates.begin(), s.gates.end(), [&](const server_steer_gate_state & g) { return g.same(*t.gate); })) {
            continue;
        }
        const int32_t n_prompt = s.request->n_prompt >= 0 ? s.request->n_prompt : (int32_t) tokens.size();
        if (n_prompt < 3) {
            throw server_steer_error(400, string_format("a gate is decided on a prompt of at least 3 tokens, this one has %d", n_prompt));
        }
        if (tokens.has_mtmd) {
            throw server_steer_error(400, "a gate cannot be decided on a prompt with images or sound");
        }
        server_steer_gate_state g;
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
