// llama-steer-pool.cpp - applies plans to a context: vectors and configs are found by content, shared, and given up when idle.

#include "llama-steer-state.h"

namespace {

constexpr size_t IDLE_CONFIGS = 64; // kept for whoever wants the same next
constexpr size_t IDLE_VECTORS = 16;
constexpr size_t IDLE_BYTES = (size_t) 256 << 20; // above this, far fewer
constexpr int32_t FIRST_CONFIG = 1 << 24;         // ids below are the caller's own

// What nobody uses, beyond the `keep` that were used last, the oldest first.
template <typename M, typename U>
std::vector<typename M::iterator> surplus(M & pool, size_t keep, U && used) {
    std::vector<typename M::iterator> idle;
    for (auto it = pool.begin(); it != pool.end(); ++it) {
        if (!used(it->second)) {
            idle.push_back(it);
        }
    }
    std::sort(idle.begin(), idle.end(), [](const auto & a, const auto & b) { return a->second.last < b->second.last; });
    idle.resize(idle.size() - std::min(idle.size(), keep));
    return idle;
}

void give_up(llama_steer_state & st, size_t keep_configs, size_t keep_vectors) {
    size_t n_dirs = 0;
    for (const auto & [_, v] : st.pool.vectors) {
        for (const auto & [at, d] : st.vectors.at(v.id).dirs) {
            n_dirs += 1 + 2 * d.columns.size();
        }
    }
    if (n_dirs * st.n_embd * sizeof(float) > IDLE_BYTES) {
        keep_configs /= 8;
        keep_vectors /= 8;
    }
    if (st.pool.configs.size() > keep_configs) {
        std::set<int32_t> ranged;
        for (const auto & [_, r] : st.ranges) {
            for (const auto & [pos, id] : r.starts) {
                ranged.insert(id);
            }
        }
        for (const auto & it : surplus(st.pool.configs, keep_configs, [&](const pooled & p) { return p.pins > 0 || ranged.count(p.id) > 0; })) {
            clear_config(st, it->second.id);
            st.pool.configs.erase(it);
        }
    }
    if (st.pool.vectors.size() > keep_vectors) {
        for (const auto & it : surplus(st.pool.vectors, keep_vectors, [&](const pooled & p) { return p.pins > 0 || in_use(st, p.id); })) {
            clear_vector(st, it->second.id);
            st.pool.vectors.erase(it);
        }
    }
}

// The id of a vector in this context.
int32_t vector_for(llama_steer_state & st, const llama_steer_vector & v) {
    if (!v.key) {
        throw steer_error(LLAMA_STEER_ERR_ARG, "a vector of a plan has no key");
    }
    auto it = st.pool.vectors.find(v.key);
    if (it == st.pool.vectors.end()) {
        int32_t id = 0;
        while (st.vectors.count(id)) {
            id++;
        }
        set_vector(st, id, v, false);
        it = st.pool.vectors.emplace(v.key, pooled{ id, 0, 0 }).first;
    }
    it->second.last = ++st.pool.clock;
    return it->second.id;
}

// A place on the device for each direction of a vector.
void make_room(llama_steer_state & st, int32_t id) {
    std::vector<place> places;
    for (const auto & [at, _] : st.vectors.at(id).dirs) {
        places.push_back(at);
    }
    if (!has_places(st, places)) {
        make_room(st, places, st.n_dyn, st.dyn_cols, st.vectors);
    }
}

// What a segment applies, in terms of this context.
std::vector<llama_steer_term> terms_of(llama_steer_state & st, const llama_steer_segment & part, int32_t n_terms, const llama_steer_plan_term * terms) {
    std::vector<llama_steer_term> res;
    for (int32_t i = 0; i < n_terms; ++i) {
        if (part.strengths[i] != 0.0) {
            if (!terms[i].vector) {
                throw steer_error(LLAMA_STEER_ERR_ARG, "a plan without vectors cannot be applied");
            }
            res.push_back({ vector_for(st, *terms[i].vector), terms[i].op, part.strengths[i], terms[i].il_first, terms[i].il_last, terms[i].stream, terms[i].level });
        }
    }
    return res;
}

// The id of the config that applies terms; 0: they are none.
int32_t config_for(llama_steer_state & st, const std::vector<llama_steer_term> & terms) {
    if (terms.empty()) {
        return 0;
    }
    std::string key;
    for (const auto & t : terms) {
        const int32_t whole[5] = { t.vector, t.op, t.il_first, t.il_last, t.stream };
        key.append(reinterpret_cast<const char *>(whole), sizeof(whole));
        key.append(reinterpret_cast<const char *>(&t.strength), sizeof(t.strength));
        key.append(reinterpret_cast<const char *>(&t.level), sizeof(t.level));
    }
    auto it = st.pool.configs.find(key);
    if (it == st.pool.configs.end()) {
        const int32_t id = FIRST_CONFIG + st.pool.next_config;
        set_config(st, id, (int32_t) terms.size(), terms.data());
        st.pool.next_config = (st.pool.next_config + 1) % FIRST_CONFIG; // years of live changes
        it = st.pool.configs.emplace(std::move(key), pooled{ id, 0, 0 }).first;
    }
    it->second.last = ++st.pool.clock;
    return it->second.id;
}

void check_plan(const llama_steer_plan * plan) {
    if (!plan) {
        throw steer_error(LLAMA_STEER_ERR_ARG, "the plan is NULL");
    }
}

} // namespace

int32_t llama_steer_plan_edits(llama_context * ctx, const llama_steer_plan * plan, int32_t n, const llama_pos * pos, uint64_t * out) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        check_plan(plan);
        if (n < 0 || (n > 0 && (!pos || !out))) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the positions or the result is NULL");
        }
        const llama_steer_segment * parts;
        const llama_steer_plan_term * terms;
        const int32_t n_parts = llama_steer_plan_segments(plan, &parts);
        const int32_t n_terms = llama_steer_plan_terms(plan, &terms);
        std::vector<uint64_t> ids(n_parts);
        std::vector<bool> known(n_parts);
        for (int32_t i = 0; i < n; ++i) {
            const auto * after = std::upper_bound(parts, parts + n_parts, pos[i], [](llama_pos p, const llama_steer_segment & s) { return p < s.first; });
            if (after == parts) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("position %d lies before the last change of the plan", pos[i]));
            }
            const int32_t k = (int32_t) (after - parts) - 1;
            if (!known[k]) {
                ids[k] = config_hash(st, terms_of(st, parts[k], n_terms, terms));
                known[k] = true;
            }
            out[i] = ids[k];
        }
        give_up(st, IDLE_CONFIGS, IDLE_VECTORS);
    });
}

int32_t llama_steer_plan_apply(llama_context * ctx, const llama_steer_plan * plan, llama_seq_id seq, llama_pos from) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        check_plan(plan);
        if (seq < 0 || from < 0) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("sequence %d has no position %d", seq, from));
        }
        const llama_steer_segment * parts;
        const llama_steer_plan_term * terms;
        const int32_t n_parts = llama_steer_plan_segments(plan, &parts);
        const int32_t n_terms = llama_steer_plan_terms(plan, &terms);
        if (n_parts == 0 || parts[0].first > from) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("position %d lies before the last change of the plan", from));
        }
        auto ranges = st.ranges;
        for (int attempt = 0;; ++attempt) {
            try {
                for (int32_t i = 0; i < n_parts; ++i) {
                    if (parts[i].end < 0 || parts[i].end > from) {
                        const int32_t config = config_for(st, terms_of(st, parts[i], n_terms, terms));
                        ranges[seq].set(std::max(from, parts[i].first), parts[i].end, config);
                    }
                }
                auto before = st.applied_from;
                before[seq] = from;
                std::swap(before, st.applied_from);
                try {
                    reserve_rows(st, ranges);
                } catch (...) {
                    std::swap(before, st.applied_from);
                    throw;
                }
                break;
            } catch (const steer_error & e) {
                if (attempt > 0 || (e.code != LLAMA_STEER_ERR_LIMIT && e.code != LLAMA_STEER_ERR_MEMORY)) {
                    throw;
                }
                give_up(st, 0, 0); // what is idle makes room
                ranges = st.ranges;
            }
        }
        st.ranges = std::move(ranges);
        give_up(st, IDLE_CONFIGS, IDLE_VECTORS);
    });
}

int32_t llama_steer_vector_pin(llama_context * ctx, const llama_steer_vector * vector, int32_t op, int32_t * id) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (!vector || !id) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the vector or the result is NULL");
        }
        if (vector->n_columns > 0) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "an add callback cannot use a vector that has columns: steer with it");
        }
        *id = vector_for(st, *vector);
        make_room(st, *id);
        auto & pins = st.pool.vectors.at(vector->key).pins;
        pins++;
        if (op == LLAMA_STEER_PROJECT || op == LLAMA_STEER_CLAMP) {
            try { // a config that projects makes it ready for g
                const llama_steer_term term = { *id, op, 1.0, -1, -1, LLAMA_STEER_STREAM_ALL, 0.0 };
                const int32_t config = config_for(st, { term });
                for (auto & [_, p] : st.pool.configs) {
                    p.pins += p.id == config ? 1 : 0;
                }
            } catch (...) {
                pins--;
                throw;
            }
        }
    });
}

int32_t llama_steer_vector_unpin(llama_context * ctx, int32_t id) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        for (auto & [_, v] : st.pool.vectors) {
            if (v.id == id && v.pins > 0) {
                v.pins--;
                for (auto & [key, c] : st.pool.configs) { // the one that made it ready for g
                    const auto & terms = st.configs.at(c.id).terms;
                    c.pins -= c.pins > 0 && terms.size() == 1 && terms[0].vector == id ? 1 : 0;
                }
                return;
            }
        }
        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is not pinned", id));
    });
}
