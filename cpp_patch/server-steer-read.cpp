// server-steer-read.cpp - hidden states that pass by: reads, gates, probes and scores, and what an answer carries of them.

#include "server-steer-state.h"

// ---- reading ----

bool server_steer_slots::is_exact(int slot) const {
    const auto * s = slots.at(slot).get();
    return s && s->request && (s->request->special() || s->captures());
}

int server_steer_slots::reuse_limit(int slot, const server_tokens & cached, int n_past) const {
    const auto * s = slots.at(slot).get();
    if (is_exact(slot) && cached.edits.moved < (size_t) n_past) {
        n_past = (int) cached.edits.moved;
    }
    return s && s->first_wanted >= 0 ? std::min(n_past, s->first_wanted) : n_past;
}

bool server_steer_slots::can_shift(int slot, const server_tokens & cached, const server_tokens & wanted) const {
    return !cached.edits.any() && !wanted.edits.any() && !is_exact(slot);
}

// Does a request read the last layer, and does it read tokens that are no outputs? Where that layer holds output tokens only, both
// cannot be captured at once.
static std::pair<bool, bool> reads_of(const server_steer_request & request, int32_t last_layer) {
    bool last = false;
    if (request.read) {
        const auto & layers = request.read->layers;
        last = std::find(layers.begin(), layers.end(), last_layer) != layers.end();
    }
    for (const auto & probe : request.probes) {
        last = last || std::find(probe->layers.begin(), probe->layers.end(), last_layer) != probe->layers.end();
    }
    const bool inner = (request.read && request.read->kind != server_steer_read_spec::LAST) || request.has_gates();
    return { last, inner };
}

bool server_steer_slots::must_wait(const server_steer_request_ptr & request) const {
    const auto & info = store.model_info();
    if (!request || !info.last_layer_outputs_only) {
        return false;
    }
    const auto [last, inner] = reads_of(*request, info.n_layer - 1);
    if (last && inner) {
        throw server_steer_error(400, string_format("layer %d holds output tokens only, so it cannot be read or probed together with a gate", info.n_layer - 1));
    }
    for (const auto & s : slots) {
        if (s && s->request) {
            const auto [other_last, other_inner] = reads_of(*s->request, info.n_layer - 1);
            if ((last && other_inner) || (inner && other_last)) {
                return true;
            }
        }
    }
    return false;
}

size_t server_steer_slots::capture_bytes(size_t n_places, bool all_streams, bool many_rows) const {
    return n_places * (many_rows ? llama_n_ubatch(ctx) : slots.size()) * store.n_embd() * sizeof(float) * (all_streams ? store.n_streams() : 1);
}

void server_steer_slots::set_captures(int slot, slot_state & s, const server_tokens & tokens) {
    std::set<std::pair<int32_t, int32_t>> need;
    const auto & info = store.model_info();
    bool need_streams = false;
    bool need_rows = store.has_drafts();
    const auto positions = server_steer_positions(tokens);

    if (s.request->read) {
        const auto & spec = *s.request->read;
        const size_t n = tokens.size();
        const size_t n_prompt = s.request->n_prompt >= 0 ? (size_t) s.request->n_prompt : n;
        std::set<size_t> rows; // token indices
        switch (spec.kind) {
            case server_steer_read_spec::LAST:
                rows.insert(n - 1);
                break;
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
                                              ? "a mean needs at least two tokens, as position 0 is left out"
                                              : "there is no response to read: the text ends with the prompt");
        }
        for (size_t i : rows) {
            s.wanted.push_back(positions[i]);
        }
        s.first_wanted = s.first_wanted < 0 ? (int32_t) *rows.begin() : std::min(s.first_wanted, (int32_t) *rows.begin());
        s.values->tokens = tokens.get_text_tokens();
        const size_t n_out = spec.streams ? info.n_streams : 1;
        const size_t width = n_out * info.n_embd;
        const size_t n_rows = spec.is_mean() ? 1 : s.wanted.size();
        s.values->positions.assign(s.wanted.begin(), s.wanted.end());
        if (spec.is_mean()) {
            s.values->positions = { s.wanted.back() };
            s.sums.assign(spec.layers.size() * width, 0.0);
        }
        s.values->values.assign(spec.layers.size() * n_rows * width, 0.0f);
        for (int32_t il : spec.layers) {
            need.insert({ il, spec.site });
        }
        need_streams = spec.streams;
        need_rows = need_rows || s.wanted.size() > 1;
    }
    for (const auto & g : s.gates) {
        need.insert({ g.gate->layers[0], g.gate->sites[0] });
        need_rows = need_rows || g.first < g.last;
    }
    for (const auto & probe : s.request->probes) {
        for (size_t i = 0; i < probe->n(); ++i) {
            need.insert({ probe->layers[i], probe->sites[i] });
        }
    }

    const bool others = std::any_of(slots.begin(), slots.end(), [&](const auto & p) {
        return p && p.get() != &s && p->captures();
    });
    const auto holds_last = [&](const std::set<std::pair<int32_t, int32_t>> & places) {
        return info.last_layer_outputs_only && !places.empty() && places.rbegin()->first == info.n_layer - 1;
    };
    // a capture of the last layer that nobody needs any more would make reads of other tokens fail
    const bool wanted_there = std::any_of(slots.begin(), slots.end(), [&](const auto & p) {
        return p && p.get() != &s && p->request && reads_of(*p->request, info.n_layer - 1).first;
    });
    const bool stale = !wanted_there && holds_last(captures) && !holds_last(need);
    const bool enough = std::includes(captures.begin(), captures.end(), need.begin(), need.end()) &&
                        (all_streams || !need_streams) && (many_rows || !need_rows) && !stale;
    if (!enough) {
        // what was captured before will be asked for again: each change of the set rebuilds the graph, and everybody waits for that
        auto next = need;
        next.insert(captures.begin(), captures.end());
        while (stale && holds_last(next)) {
            next.erase(std::prev(next.end()));
        }
        if (others || capture_bytes(next.size(), need_streams || all_streams, need_rows || many_rows) <= MAX_CAPTURE_BYTES) {
            need_streams = need_streams || all_streams;
            need_rows = need_rows || many_rows;
        } else {
            next = need;
        }
        std::vector<int32_t> layers;
        std::vector<int32_t> sites;
        for (const auto & [il, site] : next) {
            layers.push_back(il);
            sites.push_back(site);
        }
        check(llama_steer_capture_set(ctx, (int32_t) layers.size(), layers.data(), sites.data(),
                                      need_streams ? LLAMA_STEER_STREAM_ALL : LLAMA_STEER_STREAM_MEAN, need_rows ? 0 : (int32_t) slots.size(), false));
        captures = next;
        all_streams = need_streams;
        many_rows = need_rows;
        check(llama_steer_set_read_callback(ctx, [](const llama_steer_rows * rows, void * self) { return static_cast<server_steer_slots *>(self)->on_rows(*rows); }, this));
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

void server_steer_slots::set_gates(slot_state & s, const server_tokens & tokens) {
    for (const auto & t : s.request->terms) {
        if (!t.gate || !t.is_active() || std::any_of(s.gates.begin(), s.gates.end(), [&](const server_steer_gate_state & g) { return g.same(*t.gate); })) {
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
        g.gate = t.gate;
        g.last = n_prompt - 2;
        g.first = g.next = t.gate->gate->mean ? 1 : g.last;
        g.sum.assign(store.n_embd(), 0.0);
        s.gates.push_back(g);
        s.held_back = n_prompt - 1;
        s.first_wanted = s.first_wanted < 0 ? g.first : std::min(s.first_wanted, g.first);
    }
}

bool server_steer_slots::holds_back(int slot, int32_t index) const {
    const auto * s = slots.at(slot).get();
    return s && s->held_back >= 0 && index == s->held_back;
}

bool server_steer_slots::on_rows(const llama_steer_rows & rows) {
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
                sum += row[k * n_embd + i];
            }
            mean[i] = sum * (1.0f / rows.n_streams);
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
        const float * row = rows.data + (size_t) r * rows.n_streams * n_embd;

        if (s.reads() && s.request->read->site == rows.site) {
            const auto & spec = *s.request->read;
            const auto layer = std::lower_bound(spec.layers.begin(), spec.layers.end(), rows.layer);
            const auto at = std::lower_bound(s.wanted.begin(), s.wanted.end(), pos);
            if (layer != spec.layers.end() && *layer == rows.layer && at != s.wanted.end() && *at == pos && s.seen.insert({ rows.layer, pos }).second) {
                const size_t n_out = spec.streams ? store.n_streams() : 1;
                const size_t width = n_out * n_embd;
                const float * src = n_out == 1 ? averaged(row) : row;
                const size_t li = layer - spec.layers.begin();
                if (spec.is_mean()) {
                    for (size_t i = 0; i < width; ++i) {
                        s.sums[li * width + i] += src[i];
                    }
                } else {
                    std::copy_n(src, width, s.values->values.begin() + (li * s.wanted.size() + (at - s.wanted.begin())) * width);
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
                    dot += (double) src[k] * probe.dirs[i * n_embd + k];
                }
                // a position may be computed again with another token: a draft that was turned down
                auto & values = s.probed[pos];
                values.resize(n_dirs, 0.0);
                values[index] = probe.scales[i] != 0.0 ? dot / std::abs(probe.scales[i]) : dot;
            }
        }
    }
    return true;
}

bool server_steer_slots::ends_at_prompt(int slot) const {
    const auto * s = slots.at(slot).get();
    return s && s->reads();
}

bool server_steer_slots::forces(int slot) const {
    const auto * s = slots.at(slot).get();
    return s && s->request && s->request->scores;
}

llama_token server_steer_slots::force(int slot, const float * logits, int32_t n_vocab, llama_token sampled) {
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

std::shared_ptr<server_steer_values> server_steer_slots::take_values(int slot) {
    auto * s = slots.at(slot).get();
    if (!s || !s->values) {
        return nullptr;
    }
    if (s->reads() && s->request->read->is_mean()) {
        for (size_t i = 0; i < s->sums.size(); ++i) {
            s->values->values[i] = (float) (s->sums[i] / (double) s->wanted.size());
        }
    }
    return std::move(s->values);
}

// ---- answers ----

std::shared_ptr<server_steer_extra> server_steer_slots::extra(int slot, part_t part) {
    auto * s = slots.at(slot).get();
    if (!s || !s->request || !s->request->named) {
        return nullptr;
    }
    auto res = std::make_shared<server_steer_extra>();
    res->whole = part == WHOLE;
    if (part == WHOLE || !s->id_sent) {
        res->request_id = s->request->id;
        s->id_sent = true;
    }
    if (part != WHOLE) {
        // the stock server sends no chunk for a token that ends inside a character, and forgets its id
        res->has_tokens = true;
        res->tokens.swap(s->unsent);
    }
    if (part == WHOLE) {
        res->probe_names = s->request->probe_names;
        res->probes = s->probe_all;
    } else if (part == CHUNK) {
        res->probe_names = s->request->probe_names;
        for (size_t i = 0; i < res->probe_names.size(); ++i) {
            res->probes.push_back({ i < s->probe_now.size() ? s->probe_now[i] : 0.0 });
        }
    }
    return res;
}
