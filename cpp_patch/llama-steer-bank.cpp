// llama-steer-bank.cpp - directions on the device, and the one place where strength, scale, window, op and stream become
// coefficients.

#include "llama-steer-state.h"

namespace llama_steer {

// ---- device side ----

ggml_context_ptr new_tensor_context(size_t n_tensors) {
    ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };
    if (!ctx) {
        throw std::bad_alloc();
    }
    return ctx;
}

ggml_backend_buffer_ptr allocate(ggml_context * ctx, ggml_backend_buffer_type_t buft, bool weights, const char * what) {
    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft) };
    if (!buf) {
        throw steer_error(LLAMA_STEER_ERR_MEMORY, format("not enough memory on %s for %s", ggml_backend_buft_name(buft), what));
    }
    // WEIGHTS keeps the scheduler from computing the edit on a neighbouring device
    ggml_backend_buffer_set_usage(buf.get(), weights ? GGML_BACKEND_BUFFER_USAGE_WEIGHTS : GGML_BACKEND_BUFFER_USAGE_ANY);
    ggml_backend_buffer_clear(buf.get(), 0);
    return buf;
}

void drop_rows(llama_steer_state & st) {
    st.row_of.clear();
    st.rows.assign(st.n_rows, {});
}

static void allocate_sums(llama_steer_state & st, std::vector<group> & groups, int32_t n_rows) {
    for (auto & g : groups) {
        auto ctx = new_tensor_context(1);
        auto * sum = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, st.n_embd, n_rows, g.slots.size());
        ggml_set_name(sum, "steer_sum");
        auto buf = allocate(ctx.get(), g.buft, true, "steering directions");
        g.sum = sum;
        g.ctx = std::move(ctx);
        g.buf = std::move(buf);
    }
}

void upload_dyn(const llama_steer_state & st, const std::vector<group> & groups, const std::vector<slot> & slots, int32_t n_dyn, int32_t dyn, const steer_vector * col) {
    std::vector<float> v(st.n_embd);
    for (const auto & sl : slots) {
        const auto & g = groups[sl.group];
        std::fill(v.begin(), v.end(), 0.0f);
        if (col) {
            auto it = col->dirs.find(sl.at);
            if (it != col->dirs.end()) {
                v = it->second.v;
            }
        }
        ggml_backend_tensor_set(g.v, v.data(), sl.index*g.v->nb[2] + dyn*g.v->nb[1], v.size()*sizeof(float));
        // vt: one float of each of its n_embd rows; read back, change, write whole rows (this is rare and small)
        std::vector<float> t((size_t) n_dyn*st.n_embd);
        ggml_backend_tensor_get(g.vt, t.data(), sl.index*g.vt->nb[2], t.size()*sizeof(float));
        for (int32_t i = 0; i < st.n_embd; ++i) {
            t[(size_t) i*n_dyn + dyn] = v[i];
        }
        ggml_backend_tensor_set(g.vt, t.data(), sl.index*g.vt->nb[2], t.size()*sizeof(float));
    }
}

static void allocate_dyn(const llama_steer_state & st, std::vector<group> & groups, const std::vector<slot> & slots, int32_t n_dyn,
        const std::vector<int32_t> & dyn_cols, const std::map<int32_t, steer_vector> & vectors) {
    if (n_dyn == 0) {
        return;
    }
    for (auto & g : groups) {
        auto ctx = new_tensor_context(2);
        auto * v  = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, st.n_embd, n_dyn, g.slots.size());
        auto * vt = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_dyn, st.n_embd, g.slots.size());
        ggml_set_name(v,  "steer_v");
        ggml_set_name(vt, "steer_vt");
        auto buf = allocate(ctx.get(), g.buft, true, "projecting directions");
        g.v  = v;
        g.vt = vt;
        g.ctx_dyn = std::move(ctx);
        g.buf_dyn = std::move(buf);
    }
    for (int32_t d = 0; d < (int32_t) dyn_cols.size(); ++d) {
        auto it = vectors.find(dyn_cols[d]);
        if (it != vectors.end()) {
            upload_dyn(st, groups, slots, n_dyn, d, &it->second);
        }
    }
}

// Bring the device side to the given places, row capacity and projecting vectors, reserve compute buffers for the new graph,
// and only then let go of the old side. On any failure the old side is in force again.
void rebuild_bank(llama_steer_state & st, const std::vector<place> & places, int32_t n_dyn, const std::vector<int32_t> & dyn_cols,
        const std::map<int32_t, steer_vector> & vectors) {
    st.not_in_callback("making room for new layers or a new projecting vector");

    std::vector<slot>        slots;
    std::map<place, int32_t> slot_of;
    std::vector<group>       groups;

    for (const auto & at : places) {
        slot sl;
        sl.at = at;
        auto * buft = st.model.select_buft(at.first);
        const int32_t n_streams = st.streams_at(at.second);
        const bool    last      = st.is_last(at);
        int32_t gi = 0;
        while (gi < (int32_t) groups.size() &&
               !(groups[gi].buft == buft && groups[gi].n_streams == n_streams && groups[gi].last == last)) {
            gi++;
        }
        if (gi == (int32_t) groups.size()) {
            groups.emplace_back();
            groups.back().buft      = buft;
            groups.back().n_streams = n_streams;
            groups.back().last      = last;
        }
        sl.group = gi;
        sl.index = (int32_t) groups[gi].slots.size();
        groups[gi].slots.push_back((int32_t) slots.size());
        slot_of[at] = (int32_t) slots.size();
        slots.push_back(sl);
    }

    st.ctx.synchronize(); // an earlier decode may still be reading the old tensors

    const int32_t n_rows = std::max(st.n_rows, 8);
    allocate_sums(st, groups, n_rows);
    allocate_dyn(st, groups, slots, n_dyn, dyn_cols, vectors);

    auto swap_all = [&]() {
        std::swap(st.slots,   slots);
        std::swap(st.slot_of, slot_of);
        std::swap(st.groups,  groups);
        st.generation++;
    };
    const int32_t n_rows_old = st.n_rows;
    const int32_t n_dyn_old  = st.n_dyn;

    swap_all();
    st.n_rows = n_rows;
    st.n_dyn  = n_dyn;
    drop_rows(st);
    try {
        st.mode = MODE_ALL;
        llama_steer_access::reserve(st.ctx);
        st.stats.n_reserves++;
    } catch (...) {
        swap_all();
        st.n_rows = n_rows_old;
        st.n_dyn  = n_dyn_old;
        drop_rows(st);
        llama_steer_access::reserve_again(st.ctx);
        throw steer_error(LLAMA_STEER_ERR_MEMORY, "not enough memory to compute with steering: use fewer layers, a smaller n_ubatch or a smaller context");
    }
}

std::vector<place> places_of(const llama_steer_state & st) {
    std::vector<place> res;
    for (const auto & sl : st.slots) {
        res.push_back(sl.at);
    }
    return res;
}

// More distinct combinations than rows: make room without touching the compute buffers, whose size does not depend on it.
static void grow_rows(llama_steer_state & st, int32_t n_rows) {
    std::vector<group> groups;
    for (const auto & g : st.groups) {
        groups.emplace_back();
        groups.back().buft      = g.buft;
        groups.back().n_streams = g.n_streams;
        groups.back().last      = g.last;
        groups.back().slots     = g.slots;
    }
    allocate_sums(st, groups, n_rows);
    for (size_t i = 0; i < groups.size(); ++i) {
        // the old rows move over, so that rows this ubatch has already been given stay valid
        const auto * src = st.groups[i].sum;
        std::vector<float> tmp((size_t) st.n_embd*st.n_rows);
        for (int64_t s = 0; s < src->ne[2]; ++s) {
            ggml_backend_tensor_get(src, tmp.data(), s*src->nb[2], tmp.size()*sizeof(float));
            ggml_backend_tensor_set(groups[i].sum, tmp.data(), s*groups[i].sum->nb[2], tmp.size()*sizeof(float));
        }
    }
    for (size_t i = 0; i < groups.size(); ++i) {
        std::swap(st.groups[i].sum, groups[i].sum);
        std::swap(st.groups[i].ctx, groups[i].ctx);
        std::swap(st.groups[i].buf, groups[i].buf);
    }
    st.n_rows = n_rows;
    st.rows.resize(n_rows);
    st.generation++;
}

// ---- coefficients: the one place where strength, scale, window, op and stream become c and g ----

bool term_covers(const llama_steer_term & t, const place & at, int32_t stream) {
    return (t.il_first < 0 || at.first >= t.il_first) && (t.il_last < 0 || at.first <= t.il_last) &&
           (t.stream < 0 || stream < 0 || t.stream == stream);
}

// stream < 0: any
void term_coefficients(const llama_steer_term & t, const direction & d, double & c, double & g) {
    c = 0.0;
    g = 0.0;
    if (t.strength == 0.0) {
        return;
    }
    switch (t.op) {
        case LLAMA_STEER_ADD:
        case LLAMA_STEER_RENORM:  c = t.strength*d.scale;           break;
        case LLAMA_STEER_PROJECT: g = -t.strength;                  break;
        case LLAMA_STEER_CLAMP:   c = t.strength*d.scale; g = -1.0; break;
        default: break;
    }
}

void check_renorm(const std::map<int32_t, steer_vector> & vectors, const std::vector<llama_steer_term> & terms) {
    for (const auto & t : terms) {
        for (const auto & other : terms) {
            const bool apart = t.stream >= 0 && other.stream >= 0 && t.stream != other.stream;
            if (t.op != LLAMA_STEER_RENORM || other.op == LLAMA_STEER_RENORM || t.strength == 0.0 || other.strength == 0.0 || apart) {
                continue;
            }
            for (const auto & [at, d] : vectors.at(t.vector).dirs) {
                if (term_covers(t, at, -1) && term_covers(other, at, -1) && vectors.at(other.vector).dirs.count(at)) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d restores the length at layer %d, where vector %d acts with another op: "
                                "what comes first is not defined", t.vector, at.first, other.vector));
                }
            }
        }
    }
}

void check_finite(const std::map<int32_t, steer_vector> & vectors, const std::vector<llama_steer_term> & terms) {
    std::map<place, std::pair<double, double>> sums; // bounds of what the terms can add up to
    for (const auto & t : terms) {
        for (const auto & [at, d] : vectors.at(t.vector).dirs) {
            if (term_covers(t, at, -1)) {
                double c, g;
                term_coefficients(t, d, c, g);
                auto & [sum_c, sum_g] = sums[at];
                sum_c += std::fabs(c);
                sum_g += std::fabs(g);
                if (!std::isfinite((float) sum_c) || !std::isfinite((float) sum_g)) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("strength %g of vector %d is too large at layer %d", t.strength, t.vector, at.first));
                }
            }
        }
    }
}

uint64_t config_hash(const llama_steer_state & st, const std::vector<llama_steer_term> & terms, const place * only) {
    // merged by direction content first: v - v is nothing, whatever the vectors are called
    struct item { double c = 0.0; double g = 0.0; };
    std::map<std::array<uint64_t, 4>, item> items;
    for (const auto & t : terms) {
        auto it = st.vectors.find(t.vector);
        if (it == st.vectors.end()) {
            continue;
        }
        for (const auto & [at, d] : it->second.dirs) {
            if (!term_covers(t, at, -1) || (only && at != *only)) {
                continue;
            }
            double c, g;
            term_coefficients(t, d, c, g);
            auto & i = items[{ d.hash, (uint64_t) at.first, (uint64_t) at.second, (uint64_t) (t.stream + 1) | (t.op == LLAMA_STEER_RENORM ? 1ull << 32 : 0) }];
            i.c += c;
            i.g += g;
        }
    }
    uint64_t id = 0;
    for (const auto & [key, i] : items) {
        if (i.c != 0.0 || i.g != 0.0) {
            id += mix64(hash_double(i.g, hash_double(i.c, hash_bytes(key.data(), sizeof(key), 0x57ee9))));
        }
    }
    const bool any = std::any_of(items.begin(), items.end(), [](const auto & kv) { return kv.second.c != 0.0 || kv.second.g != 0.0; });
    return any && id == 0 ? 1 : id;
}

// Fill row r for (terms, callback values) at one stream (-1: all streams alike) and write it to the device.
static void fill_row(llama_steer_state & st, int32_t r, const std::vector<llama_steer_term> & terms, int32_t stream,
        const float * cb_c, const float * cb_g, int32_t n_cb) {
    auto & row = st.rows[r];
    row.zero = true;
    row.g.assign(st.slots.size()*st.n_dyn, 0.0f);
    row.active.assign(st.slots.size(), false);
    row.renorm.assign(st.slots.size(), false);

    std::vector<float> packed(st.slots.size()*(size_t) st.n_embd, 0.0f);
    std::vector<double> acc(st.n_embd);
    std::map<uint64_t, std::pair<double, const direction *>> sums;

    for (size_t s = 0; s < st.slots.size(); ++s) {
        const place & at = st.slots[s].at;
        sums.clear();
        auto take = [&](const steer_vector & col, const direction & d, double c, double g) {
            if (c != 0.0) {
                auto & e = sums[d.hash];
                e.first += c;
                e.second = &d;
            }
            if (g != 0.0) {
                row.g[s*st.n_dyn + col.dyn] += (float) g;
            }
        };
        for (const auto & t : terms) {
            const auto & col = st.vectors.at(t.vector);
            auto it = col.dirs.find(at);
            // a stream is a notion of resid_post only; other sites have one row for each token
            if (it == col.dirs.end() || !term_covers(t, at, stream)) {
                continue;
            }
            double c, g;
            term_coefficients(t, it->second, c, g);
            take(col, it->second, c, g);
            row.renorm[s] = row.renorm[s] || (t.op == LLAMA_STEER_RENORM && t.strength != 0.0);
        }
        for (int32_t k = 0; k < n_cb; ++k) {
            if (cb_c[k] == 0.0f && cb_g[k] == 0.0f) {
                continue;
            }
            const auto & col = st.vectors.at(k);
            auto it = col.dirs.find(at);
            if (it != col.dirs.end()) {
                if (row.renorm[s]) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave a coefficient to vector %d at layer %d, where a config restores the length", k, at.first));
                }
                take(col, it->second, (double) cb_c[k]*it->second.scale, cb_g[k]);
            }
        }
        std::fill(acc.begin(), acc.end(), 0.0);
        bool any = false;
        for (const auto & [hash, e] : sums) {
            if (e.first == 0.0) {
                continue;
            }
            any = true;
            const float * v = e.second->v.data();
            for (int32_t i = 0; i < st.n_embd; ++i) {
                acc[i] += e.first*v[i];
            }
        }
        if (any) {
            float * dst = packed.data() + s*st.n_embd;
            for (int32_t i = 0; i < st.n_embd; ++i) {
                dst[i] = (float) acc[i];
                if (!std::isfinite(dst[i])) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("the coefficients at layer %d add up to more than float32 can hold", at.first));
                }
            }
        }
        for (int32_t d = 0; d < st.n_dyn; ++d) {
            const float g = row.g[s*st.n_dyn + d];
            if (!std::isfinite(g)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the coefficients at layer %d add up to more than float32 can hold", at.first));
            }
            any = any || g != 0.0f;
        }
        row.active[s] = any;
        row.renorm[s] = row.renorm[s] && any;
        row.zero      = row.zero && !any;
    }

    if (row.zero) {
        return; // row 0 is used instead
    }
    for (size_t s = 0; s < st.slots.size(); ++s) {
        auto * sum = st.groups[st.slots[s].group].sum;
        ggml_backend_tensor_set(sum, packed.data() + s*st.n_embd, st.slots[s].index*sum->nb[2] + r*sum->nb[1], st.n_embd*sizeof(float));
    }
    st.stats.n_row_uploads++;
}

// The row for a combination: resident, or put there in place of the one that was used longest ago.
int32_t row_for(llama_steer_state & st, int32_t cfg, int32_t stream, const float * cb_c, const float * cb_g, int32_t n_cb) {
    static const std::vector<llama_steer_term> no_terms;

    std::string key(8, '\0');
    memcpy(&key[0], &cfg,    4);
    memcpy(&key[4], &stream, 4);
    if (n_cb > 0) {
        key.append(reinterpret_cast<const char *>(cb_c), n_cb*sizeof(float));
        key.append(reinterpret_cast<const char *>(cb_g), n_cb*sizeof(float));
    }

    auto it = st.row_of.find(key);
    if (it == st.row_of.end()) {
        int32_t best = -1;
        for (int32_t r = 1; r < st.n_rows; ++r) {
            if (st.rows[r].key.empty()) {
                best = r;
                break;
            }
            if (st.rows[r].used != st.stats.n_ubatches && (best < 0 || st.rows[r].used < st.rows[best].used)) {
                best = r;
            }
        }
        if (best < 0) {
            best = st.n_rows;
            grow_rows(st, st.n_rows*2);
        }
        if (!st.rows[best].key.empty()) {
            st.row_of.erase(st.rows[best].key);
            st.rows[best].key.clear();
        }
        auto c = st.configs.find(cfg);
        fill_row(st, best, c == st.configs.end() ? no_terms : c->second.terms, stream, cb_c, cb_g, n_cb);
        st.rows[best].key    = key;
        st.rows[best].config = cfg;
        it = st.row_of.emplace(key, best).first;
    }
    auto & row = st.rows[it->second];
    row.used = st.stats.n_ubatches;
    return row.zero ? 0 : it->second;
}

// a config changed: its rows are no longer what they say
void forget_rows_of(llama_steer_state & st, int32_t cfg) {
    for (auto & row : st.rows) {
        if (row.key.size() >= 8 && memcmp(row.key.data(), &cfg, 4) == 0) {
            st.row_of.erase(row.key);
            row.key.clear();
            row.used = 0;
        }
    }
}

void drop_kept(llama_steer_state & st) {
    for (auto & tp : st.captures) {
        std::vector<float>().swap(tp.kept);
    }
    st.kept_at.clear();
}

void refresh_ids(llama_steer_state & st) {
    for (auto & [_, c] : st.configs) {
        set_acting(st, c);
    }
}

// What a config is remembered by, and where it has to be seen to act.
void set_acting(llama_steer_state & st, config & c) {
    c.id = config_hash(st, c.terms);
    c.fired.clear();
    for (const auto & t : c.terms) {
        for (const auto & [at, d] : st.vectors.at(t.vector).dirs) {
            if (!c.fired.count(at) && term_covers(t, at, -1) && config_hash(st, c.terms, &at) != 0) {
                c.fired[at] = 0;
            }
        }
    }
}

bool in_use(const llama_steer_state & st, int32_t vector) {
    for (const auto & [_, c] : st.configs) {
        for (const auto & t : c.terms) {
            if (t.vector == vector) {
                return true;
            }
        }
    }
    return false;
}

} // namespace llama_steer
