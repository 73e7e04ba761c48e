// llama-steer-bank.cpp - the device side: what reads the state (directions that project, columns), and a row for each distinct sum of what
// is added.

#include "llama-steer-state.h"

namespace llama_steer {

// ---- device side ----

ggml_context_ptr new_tensor_context(size_t n_tensors) {
    ggml_init_params params = {
        /*.mem_size   =*/n_tensors * ggml_tensor_overhead(),
        /*.mem_buffer =*/nullptr,
        /*.no_alloc   =*/true,
    };
    ggml_context_ptr ctx{ ggml_init(params) };
    if (!ctx) {
        throw std::bad_alloc();
    }
    return ctx;
}

ggml_backend_buffer_ptr allocate(ggml_context * ctx, ggml_backend_buffer_type_t buft, bool weights, const char * what) {
    ggml_backend_buffer_ptr buf{ ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft) };
    if (!buf) {
        throw steer_error(LLAMA_STEER_ERR_MEMORY, format("not enough memory on %s for %s", ggml_backend_buft_name(buft), what));
    }
    // WEIGHTS keeps the scheduler from computing the edit on a neighbouring device
    ggml_backend_buffer_set_usage(buf.get(), weights ? GGML_BACKEND_BUFFER_USAGE_WEIGHTS : GGML_BACKEND_BUFFER_USAGE_ANY);
    ggml_backend_buffer_clear(buf.get(), 0);
    return buf;
}

// Where the directions of a layer are kept: with its weights, if that device can gather and scatter rows.
static ggml_backend_buffer_type_t buft_of(const llama_steer_state & st, int32_t il) {
    auto * buft = st.model.select_buft(il);
    auto * dev = ggml_backend_buft_get_device(buft);
    if (!dev) {
        return buft; // the CPU's own
    }
    auto ctx = new_tensor_context(8);
    ggml_tensor * rows = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, st.n_embd, 4);
    ggml_tensor * some = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, st.n_embd, 2);
    ggml_tensor * get = ggml_get_rows(ctx.get(), rows, ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 2));
    ggml_tensor * set = ggml_set_rows(ctx.get(), rows, some, ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 2));
    for (const auto * op : { get, set }) {
        if (!ggml_backend_dev_supports_op(dev, op)) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, format("the device of layer %d (%s) cannot %s: keep this layer on another one", il,
                                                           ggml_backend_dev_name(dev), ggml_op_desc(op)));
        }
    }
    return buft;
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

void upload_dyn(const llama_steer_state & st, const std::vector<group> & groups, const std::vector<slot> & slots, int32_t n_dyn, int32_t dyn,
                const steer_vector * col, int32_t part) {
    const std::vector<float> nothing(st.n_embd, 0.0f);
    for (const auto & sl : slots) {
        const auto & g = groups[sl.group];
        std::vector<float> read = nothing;
        std::vector<float> write = nothing;
        const auto it = col ? col->dirs.find(sl.at) : decltype(col->dirs.end()){};
        if (col && it != col->dirs.end()) {
            const direction & d = it->second;
            if (part < 0) {
                read = write = d.v;
            } else if (part < (int32_t) d.columns.size()) {
                read = d.columns[part].read;
                write = d.columns[part].write;
            }
            if (part == PART_FLOOR) {
                std::transform(read.begin(), read.end(), read.begin(), [](float x) { return -x; });
            }
        }
        ggml_backend_tensor_set(g.v, read.data(), sl.index * g.v->nb[2] + dyn * g.v->nb[1], read.size() * sizeof(float));
        // vt: one float of each of its n_embd rows; read back, change, write whole rows (this is rare and small)
        std::vector<float> t((size_t) n_dyn * st.n_embd);
        ggml_backend_tensor_get(g.vt, t.data(), sl.index * g.vt->nb[2], t.size() * sizeof(float));
        for (int32_t i = 0; i < st.n_embd; ++i) {
            t[(size_t) i * n_dyn + dyn] = write[i];
        }
        ggml_backend_tensor_set(g.vt, t.data(), sl.index * g.vt->nb[2], t.size() * sizeof(float));
    }
}

static void allocate_dyn(const llama_steer_state & st, std::vector<group> & groups, const std::vector<slot> & slots, int32_t n_dyn,
                         const std::vector<part_key> & dyn_cols, const vectors_by_id & vectors) {
    if (n_dyn == 0) {
        return;
    }
    for (auto & g : groups) {
        auto ctx = new_tensor_context(2);
        auto * v = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, st.n_embd, n_dyn, g.slots.size());
        auto * vt = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_dyn, st.n_embd, g.slots.size());
        ggml_set_name(v, "steer_v");
        ggml_set_name(vt, "steer_vt");
        auto buf = allocate(ctx.get(), g.buft, true, "projecting directions");
        g.v = v;
        g.vt = vt;
        g.ctx_dyn = std::move(ctx);
        g.buf_dyn = std::move(buf);
    }
    for (int32_t d = 0; d < (int32_t) dyn_cols.size(); ++d) {
        auto it = vectors.find(dyn_cols[d].first);
        if (it != vectors.end()) {
            upload_dyn(st, groups, slots, n_dyn, d, &it->second, dyn_cols[d].second);
        }
    }
}

// Bring the device side to the given places, row capacity and parts that read the state, reserve compute buffers for the new graph,
// and only then let go of the old side. On any failure the old side is in force again.
void rebuild_bank(llama_steer_state & st, const std::vector<place> & places, int32_t n_dyn, const std::vector<part_key> & dyn_cols,
                  const vectors_by_id & vectors) {
    st.not_in_callback("making room for new layers or a new projecting vector");

    std::vector<slot> slots;
    std::map<place, int32_t> slot_of;
    std::vector<group> groups;

    for (const auto & at : places) {
        slot sl;
        sl.at = at;
        auto * buft = buft_of(st, at.first);
        const int32_t n_streams = st.streams_at(at);
        const bool last = st.gathered(at);
        int32_t gi = 0;
        while (gi < (int32_t) groups.size() &&
               !(groups[gi].buft == buft && groups[gi].n_streams == n_streams && groups[gi].last == last)) {
            gi++;
        }
        if (gi == (int32_t) groups.size()) {
            groups.emplace_back();
            groups.back().buft = buft;
            groups.back().n_streams = n_streams;
            groups.back().last = last;
        }
        sl.group = gi;
        sl.index = (int32_t) groups[gi].slots.size();
        groups[gi].slots.push_back((int32_t) slots.size());
        slot_of[at] = (int32_t) slots.size();
        slots.push_back(sl);
    }

    st.ctx.synchronize(); // an earlier decode may still be reading the old tensors

    const int32_t n_rows = std::max(st.n_rows, MIN_ROWS);
    allocate_sums(st, groups, n_rows);
    allocate_dyn(st, groups, slots, n_dyn, dyn_cols, vectors);

    auto swap_all = [&]() {
        std::swap(st.slots, slots);
        std::swap(st.slot_of, slot_of);
        std::swap(st.groups, groups);
        st.kind_used.assign(st.slots.size(), {});
        st.generation++;
    };
    const int32_t n_rows_old = st.n_rows;
    const int32_t n_dyn_old = st.n_dyn;

    swap_all();
    st.n_rows = n_rows;
    st.n_dyn = n_dyn;
    drop_rows(st);
    try {
        st.want_all();
        llama_steer_access::reserve(st.ctx);
        st.stats.n_reserves++;
    } catch (...) {
        swap_all();
        st.n_rows = n_rows_old;
        st.n_dyn = n_dyn_old;
        drop_rows(st);
        st.want_all();
        llama_steer_access::reserve_again(st.ctx);
        throw steer_error(LLAMA_STEER_ERR_MEMORY, "not enough memory to compute with steering: use fewer layers, a smaller n_ubatch or a smaller context");
    }
}

bool has_places(const llama_steer_state & st, const std::vector<place> & places) {
    return std::all_of(places.begin(), places.end(), [&](const place & at) { return st.slot_of.count(at) > 0; });
}

void make_room(llama_steer_state & st, const std::vector<place> & places, int32_t n_dyn, const std::vector<part_key> & dyn_cols, const vectors_by_id & vectors) {
    std::set<place> all(places.begin(), places.end());
    for (const auto & sl : st.slots) {
        all.insert(sl.at);
    }
    rebuild_bank(st, { all.begin(), all.end() }, n_dyn, dyn_cols, vectors);
}

// ---- rows ----

// Another number of rows, without touching the compute buffers, whose size does not depend on it. `keep`: the old ones stay valid.
static void resize_rows(llama_steer_state & st, int32_t n_rows, bool keep) {
    std::vector<group> groups;
    for (const auto & g : st.groups) {
        groups.emplace_back();
        groups.back().buft = g.buft;
        groups.back().n_streams = g.n_streams;
        groups.back().last = g.last;
        groups.back().slots = g.slots;
    }
    allocate_sums(st, groups, n_rows);
    for (size_t i = 0; i < groups.size(); ++i) {
        if (!keep) {
            break;
        }
        const auto * src = st.groups[i].sum;
        std::vector<float> tmp((size_t) st.n_embd * st.n_rows);
        for (int64_t s = 0; s < src->ne[2]; ++s) {
            ggml_backend_tensor_get(src, tmp.data(), s * src->nb[2], tmp.size() * sizeof(float));
            ggml_backend_tensor_set(groups[i].sum, tmp.data(), s * groups[i].sum->nb[2], tmp.size() * sizeof(float));
        }
    }
    for (size_t i = 0; i < groups.size(); ++i) {
        std::swap(st.groups[i].sum, groups[i].sum);
        std::swap(st.groups[i].ctx, groups[i].ctx);
        std::swap(st.groups[i].buf, groups[i].buf);
    }
    st.n_rows = n_rows;
    if (keep) {
        st.rows.resize(n_rows);
    } else {
        drop_rows(st);
    }
    st.generation++;
}

static int32_t max_rows(const llama_steer_state & st) {
    const size_t row = std::max<size_t>(1, st.slots.size()) * st.n_embd * sizeof(float);
    return (int32_t) std::min<size_t>(MAX_ROWS, std::max<size_t>(MIN_MAX_ROWS, MAX_ROW_BYTES / row));
}

void reserve_rows(llama_steer_state & st, const std::map<llama_seq_id, interval_map<int32_t>> & ranges) {
    if (st.slots.empty()) {
        return;
    }
    std::set<int32_t> ahead; // configs that a token may still be computed with
    for (const auto & [seq, range] : ranges) {
        auto from = st.applied_from.find(seq);
        auto it = range.starts.upper_bound(from == st.applied_from.end() ? 0 : from->second);
        for (it = it == range.starts.begin() ? it : std::prev(it); it != range.starts.end(); ++it) {
            ahead.insert(it->second);
        }
    }
    int32_t need = 1;
    for (int32_t id : ahead) {
        auto c = st.configs.find(id);
        need += c == st.configs.end() ? 0 : c->second.by_stream() ? st.n_streams
                                                                  : 1;
    }
    int32_t n_rows = st.n_rows;
    while (n_rows < std::min(need, max_rows(st))) {
        n_rows *= 2;
    }
    if (n_rows > st.n_rows) {
        st.ctx.synchronize();
        resize_rows(st, n_rows, true);
    }
}

void give_back_rows(llama_steer_state & st) {
    if (st.n_rows > MIN_ROWS && !st.in_callback) {
        try {
            st.ctx.synchronize();
            resize_rows(st, MIN_ROWS, false);
        } catch (const steer_error &) {
            // then it stays as it is
        }
    }
}

// Fill row r for (terms, callback values) at one stream (-1: all streams alike) and write it to the device.
static void fill_row(llama_steer_state & st, int32_t r, const std::vector<llama_steer_term> & terms, int32_t stream,
                     const float * cb_c, const float * cb_g, int32_t n_cb) {
    auto & row = st.rows[r];
    row.zero = true;
    const size_t plane = st.slots.size() * st.n_dyn;
    row.g.assign(3 * plane, 0.0f);
    row.kinds.assign(st.slots.size(), 0);

    std::vector<float> packed(st.slots.size() * (size_t) st.n_embd, 0.0f);
    std::vector<double> acc(st.n_embd);
    std::map<uint64_t, std::pair<double, const direction *>> sums;
    growth_bound bound; // of a config it was checked when it was set; what a callback adds comes on top
    std::vector<part_edit> parts;
    std::vector<double> gains(st.n_dyn); // as exact as sums: whether terms cancel is decided on the same numbers as their id

    for (size_t s = 0; s < st.slots.size(); ++s) {
        const place & at = st.slots[s].at;
        sums.clear();
        std::fill(gains.begin(), gains.end(), 0.0);
        bool renorm = false;
        bool knee = false;
        auto take = [&](const steer_vector & col, const direction & d, double c) {
            bound.take(d, c, parts);
            if (c != 0.0) {
                auto & e = sums[d.hash];
                e.first += c;
                e.second = &d;
            }
            for (const auto & p : parts) {
                const int32_t dyn = col.dyn.at(p.part);
                float * g = row.g.data() + s * st.n_dyn + dyn;
                gains[dyn] += p.g;
                g[0] = (float) gains[dyn];
                g[plane] = (float) p.bias;
                g[2 * plane] = p.knee == LINEAR ? std::numeric_limits<float>::max() : (float) -p.knee;
                knee = knee || p.bias != 0.0 || p.knee != LINEAR;
            }
        };
        for (const auto & t : terms) {
            const auto & col = st.vectors.at(t.vector);
            auto it = col.dirs.find(at);
            // a stream is a notion of resid_post only; other sites have one row for each token
            if (it == col.dirs.end() || !term_covers(t, at, stream)) {
                continue;
            }
            double c;
            term_coefficients(t, it->second, c, parts);
            take(col, it->second, c);
            renorm = renorm || (t.op == LLAMA_STEER_RENORM && t.strength != 0.0);
        }
        for (int32_t k = 0; k < n_cb; ++k) {
            if (cb_c[k] == 0.0f && cb_g[k] == 0.0f) {
                continue;
            }
            const auto & col = st.vectors.at(k);
            auto it = col.dirs.find(at);
            if (it != col.dirs.end()) {
                if (renorm) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave a coefficient to vector %d at layer %d, where a config restores the length", k, at.first));
                }
                const double c = (double) cb_c[k] * it->second.scale;
                if (!(std::fabs(c) <= LLAMA_STEER_MAX_DOSE)) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave vector %d a coefficient of %g, which is too large at layer %d: a dose of %g is the limit",
                                                                  k, cb_c[k], at.first, LLAMA_STEER_MAX_DOSE));
                }
                parts.clear();
                if (cb_g[k] != 0.0f) {
                    parts.push_back({ PART_SELF, cb_g[k], 0.0, LINEAR, nullptr, it->second.hash });
                }
                take(col, it->second, c);
            }
        }
        if (n_cb > 0) {
            bound.pass(at);
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
                acc[i] += e.first * v[i];
            }
        }
        if (any) {
            std::transform(acc.begin(), acc.end(), packed.data() + s * st.n_embd, [](double x) { return (float) x; });
        }
        const bool dyn = std::any_of(row.g.begin() + s * st.n_dyn, row.g.begin() + (s + 1) * st.n_dyn, [](float g) { return g != 0.0f; });
        row.kinds[s] = (any ? KIND_ADD : 0) | (dyn ? KIND_DYN : 0) | (dyn && knee ? KIND_KNEE : 0) | (renorm && (any || dyn) ? KIND_RENORM : 0);
        row.zero = row.zero && row.kinds[s] == 0;
    }

    if (row.zero) {
        return; // row 0 is used instead
    }
    for (size_t s = 0; s < st.slots.size(); ++s) {
        auto * sum = st.groups[st.slots[s].group].sum;
        ggml_backend_tensor_set(sum, packed.data() + s * st.n_embd, st.slots[s].index * sum->nb[2] + r * sum->nb[1], st.n_embd * sizeof(float));
    }
    st.stats.n_row_uploads++;
}

// Rows are written before the graph runs: no earlier compute may still read them. Most ubatches find theirs resident, and need not wait.
static void wait_for_rows(llama_steer_state & st) {
    if (!st.row_waited) {
        ggml_backend_sched_synchronize(st.ctx.get_sched());
        st.row_waited = true;
        st.stats.n_row_waits++;
    }
}

int32_t row_for(llama_steer_state & st, int32_t cfg, int32_t stream, const float * cb_c, const float * cb_g, int32_t n_cb) {
    static const std::vector<llama_steer_term> no_terms;

    std::string key(8, '\0');
    memcpy(&key[0], &cfg, 4);
    memcpy(&key[4], &stream, 4);
    if (n_cb > 0) {
        key.append(reinterpret_cast<const char *>(cb_c), n_cb * sizeof(float));
        key.append(reinterpret_cast<const char *>(cb_g), n_cb * sizeof(float));
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
        wait_for_rows(st);
        if (best < 0) {
            if (st.n_rows >= max_rows(st)) {
                throw steer_error(LLAMA_STEER_ERR_LIMIT, format("more than %d different steerings meet in one batch: use a smaller n_ubatch, or fewer at once", st.n_rows - 1));
            }
            best = st.n_rows;
            resize_rows(st, st.n_rows * 2, true);
        }
        if (!st.rows[best].key.empty()) {
            st.row_of.erase(st.rows[best].key);
            st.rows[best].key.clear();
        }
        auto c = st.configs.find(cfg);
        fill_row(st, best, c == st.configs.end() ? no_terms : c->second.terms, stream, cb_c, cb_g, n_cb);
        st.rows[best].key = key;
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

} // namespace llama_steer
