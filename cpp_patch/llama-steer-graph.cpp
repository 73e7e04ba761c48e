// llama-steer-graph.cpp - what is added to a compute graph, and what is done before and after each ubatch.

#include "llama-batch.h"
#include "llama-graph.h"
#include "llama-steer-state.h"

namespace {

// A gather that serves all slots of a group costs one node instead of one for each layer; above this it would cost memory.
constexpr size_t FUSE_MAX_BYTES = 8u << 20;

class input_steer : public llm_graph_input_i {
public:
    struct group_input {
        ggml_tensor * idx = nullptr;       // I32 [rows, n_slots]
        ggml_tensor * g = nullptr;         // F32 [n_dyn, rows, n_slots]; where something has a knee, three of these: see row_info::g
        ggml_tensor * w = nullptr;         // F32 [1, rows, n_slots]: 1 where the length is restored
        ggml_tensor * fused = nullptr;     // F32 [n_embd, rows, n_slots]
        ggml_tensor * all = nullptr;       // view of idx: [rows]
        std::vector<ggml_tensor *> deltas; // [n_slots] views of fused
        bool outputs_only = false;
    };
    struct capture_input {
        ggml_tensor * idx = nullptr; // I64 [rows]
        bool outputs_only = false;
        int32_t n_out = 1;
    };

    input_steer(llama_steer_state * st, int mode, uint32_t n_tokens, uint32_t n_outputs)
        : st(st), mode(mode), kinds(st->kinds), generation(st->generation), n_tokens(n_tokens), n_outputs(n_outputs),
          groups(st->groups.size()), captures(st->captures.size()) {}

    // the token behind each row of a node: all tokens, or the outputs in batch order (as llm_graph_input_out_ids has them)
    static std::vector<uint32_t> tokens_of(const llama_ubatch * ub, bool outputs_only, uint32_t n_outputs) {
        std::vector<uint32_t> res;
        for (uint32_t i = 0; i < ub->n_tokens; ++i) {
            if (!outputs_only || n_outputs == ub->n_tokens || ub->output[i]) {
                res.push_back(i);
            }
        }
        return res;
    }

    void set_input(const llama_ubatch * ub) override {
        const bool live = st->live && st->n_tokens == ub->n_tokens;
        for (size_t gi = 0; gi < groups.size(); ++gi) {
            const auto & in = groups[gi];
            if (!in.idx || !in.idx->buffer) {
                continue; // not part of this graph
            }
            const auto & gr = st->groups[gi];
            const auto toks = tokens_of(ub, in.outputs_only, n_outputs);
            const size_t n_rows = toks.size() * gr.n_streams;
            const size_t n_slots = gr.slots.size();
            GGML_ASSERT((int64_t) n_rows == in.idx->ne[0]);

            idx.assign(n_rows * in.idx->ne[1], 0);
            if (live) {
                for (size_t t = 0; t < toks.size(); ++t) {
                    for (int32_t s = 0; s < gr.n_streams; ++s) {
                        idx[t * gr.n_streams + s] = st->row_idx[toks[t] * st->n_streams + s];
                    }
                }
                for (int64_t k = 1; k < in.idx->ne[1]; ++k) {
                    std::copy_n(idx.begin(), n_rows, idx.begin() + k * n_rows);
                }
            }
            ggml_backend_tensor_set(in.idx, idx.data(), 0, idx.size() * sizeof(int32_t));

            if (in.g && in.g->buffer) {
                const size_t n_dyn = st->n_dyn;
                const size_t n_planes = in.g->ne[2] / n_slots;
                g.assign(n_planes * n_slots * n_rows * n_dyn, 0.0f);
                for (size_t k = 0; live && k < n_planes * n_slots; ++k) {
                    const size_t from = (k / n_slots * st->slots.size() + gr.slots[k % n_slots]) * n_dyn;
                    for (size_t r = 0; r < n_rows; ++r) {
                        if (idx[r] != 0) {
                            std::copy_n(st->rows[idx[r]].g.begin() + from, n_dyn, g.begin() + (k * n_rows + r) * n_dyn);
                        }
                    }
                }
                ggml_backend_tensor_set(in.g, g.data(), 0, g.size() * sizeof(float));
            }
            if (in.w && in.w->buffer) {
                g.assign(n_slots * n_rows, 0.0f);
                for (size_t k = 0; live && k < n_slots; ++k) {
                    for (size_t r = 0; r < n_rows; ++r) {
                        g[k * n_rows + r] = idx[r] != 0 && (st->rows[idx[r]].kinds[gr.slots[k]] & KIND_RENORM) != 0 ? 1.0f : 0.0f;
                    }
                }
                ggml_backend_tensor_set(in.w, g.data(), 0, g.size() * sizeof(float));
            }
            if (live) {
                for (int32_t k : gr.slots) {
                    if (!hooked.count(st->slots[k].at)) {
                        continue;
                    }
                    std::set<int32_t> acting;
                    for (size_t r = 0; r < n_rows; ++r) {
                        if (idx[r] != 0 && (r == 0 || idx[r] != idx[r - 1]) && st->rows[idx[r]].kinds[k] != 0) {
                            acting.insert(st->rows[idx[r]].config);
                        }
                    }
                    st->fired[st->slots[k].at] += acting.empty() ? 0 : 1;
                    for (int32_t id : acting) {
                        auto c = st->configs.find(id);
                        if (c != st->configs.end() && c->second.fired.count(st->slots[k].at)) {
                            c->second.fired[st->slots[k].at]++;
                        }
                    }
                }
            }
        }
        st->capture_built = mode & MODE_CAPTURE ? true : st->capture_built;
        for (const auto & in : captures) {
            if (!in.idx || !in.idx->buffer) {
                st->capture_built = st->capture_built && !(mode & MODE_CAPTURE);
                continue;
            }
            const auto toks = tokens_of(ub, in.outputs_only, n_outputs);
            GGML_ASSERT((int64_t) toks.size() * in.n_out == in.idx->ne[0]);
            rows.resize(toks.size() * in.n_out);
            for (size_t t = 0; t < toks.size(); ++t) {
                const int32_t at = live ? st->capture_idx[toks[t]] : -1;
                for (int32_t s = 0; s < in.n_out; ++s) {
                    rows[t * in.n_out + s] = (int64_t) (at < 0 ? st->capture_rows : at) * in.n_out + s;
                }
            }
            ggml_backend_tensor_set(in.idx, rows.data(), 0, rows.size() * sizeof(int64_t));
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        return st->mode == mode && (mode == 0 || st->generation == generation) && (!(mode & MODE_EDIT) || st->kinds == kinds) &&
               params.ubatch.n_tokens == n_tokens && params.n_outputs == n_outputs;
    }

    llama_steer_state * st;
    const int mode;
    const std::vector<uint8_t> kinds; // of edits, by slot
    const uint64_t generation;
    const uint32_t n_tokens;
    const uint32_t n_outputs;

    std::vector<group_input> groups;
    std::vector<capture_input> captures;
    std::map<place, bool> hooked; // places whose edit is in this graph
    uint64_t n_nodes = 0;         // of edits

private:
    std::vector<int32_t> idx;
    std::vector<float> g;
    std::vector<int64_t> rows;
};

input_steer * input_of(const llm_graph_context & graph, llama_steer_state * st) {
    for (auto & input : graph.res->inputs) {
        if (auto * in = dynamic_cast<input_steer *>(input.get())) {
            return in;
        }
    }
    // registered in the plain graph as well, with no tensors: it is what tells that graph to give way to a steered one
    auto in = std::make_unique<input_steer>(st, st->mode, graph.n_tokens, graph.n_outputs);
    if (st->live) {
        st->stats.n_graph_builds++;
        st->stats.n_graph_on += st->mode != 0;
    }
    return static_cast<input_steer *>(graph.res->add_input(std::move(in)));
}

// Is the node what was found out of its place?
bool is_as_found(const llm_graph_context & graph, const ggml_tensor * cur, const place_facts & facts) {
    const int64_t n = facts.gathered ? graph.n_outputs : graph.n_tokens;
    const bool streams = facts.n_streams > 1;
    return cur->type == GGML_TYPE_F32 && cur->ne[3] == 1 && cur->ne[streams ? 2 : 1] == n && (streams ? cur->ne[1] == facts.n_streams : cur->ne[2] == 1);
}

ggml_tensor * build_edit(const llm_graph_context & graph, llama_steer_state * st, input_steer * in, ggml_tensor * cur, int32_t si, bool outputs_only) {
    ggml_context * ctx0 = graph.ctx0;
    const auto op = [&](ggml_tensor * t) { // counted
        in->n_nodes++;
        return t;
    };

    const auto & sl = st->slots[si];
    const auto & gr = st->groups[sl.group];
    auto & gin = in->groups[sl.group];

    const uint8_t kinds = in->kinds[si];
    const int64_t n_embd = cur->ne[0];
    const int64_t n_rows = ggml_nrows(cur);
    const int64_t n_slots = (int64_t) gr.slots.size();

    if (!gin.idx) {
        const auto count = [&](kind_bits kind) {
            return std::count_if(gr.slots.begin(), gr.slots.end(), [&](int32_t k) { return (in->kinds[k] & kind) != 0; });
        };
        // one gather for all, unless most of it would be for nothing, or too large
        const int64_t n_adds = count(KIND_ADD);
        const bool fuse = n_adds > 1 && 2 * n_adds > n_slots && (size_t) (n_embd * n_rows * n_slots) * sizeof(float) <= FUSE_MAX_BYTES;

        gin.outputs_only = outputs_only;
        gin.idx = ggml_new_tensor_2d(ctx0, GGML_TYPE_I32, n_rows, fuse ? n_slots : 1);
        ggml_set_input(gin.idx);
        ggml_set_name(gin.idx, "steer_idx");
        if (count(KIND_DYN) > 0) {
            gin.g = ggml_new_tensor_3d(ctx0, GGML_TYPE_F32, st->n_dyn, n_rows, n_slots * (count(KIND_KNEE) > 0 ? 3 : 1));
            ggml_set_input(gin.g);
            ggml_set_name(gin.g, "steer_g");
        }
        if (count(KIND_RENORM) > 0) {
            gin.w = ggml_new_tensor_3d(ctx0, GGML_TYPE_F32, 1, n_rows, n_slots);
            ggml_set_input(gin.w);
            ggml_set_name(gin.w, "steer_w");
        }
        if (fuse) {
            gin.fused = op(ggml_get_rows(ctx0, gr.sum, gin.idx));
            ggml_set_name(gin.fused, "steer_rows");
            gin.deltas.resize(n_slots);
            for (int64_t k = 0; k < n_slots; ++k) { // now, so that each add stands next to what it adds to
                if (in->kinds[gr.slots[k]] & KIND_ADD) {
                    gin.deltas[k] = ggml_view_2d(ctx0, gin.fused, n_embd, n_rows, gin.fused->nb[1], k * gin.fused->nb[2]);
                    ggml_build_forward_expand(graph.gf, gin.deltas[k]);
                }
            }
        } else {
            // in the graph even where nothing is gathered with it: an input that no node uses is not allocated
            gin.all = ggml_view_1d(ctx0, gin.idx, n_rows, 0);
            ggml_build_forward_expand(graph.gf, gin.all);
        }
    }

    const bool flat = ggml_is_contiguous(cur) && cur->ne[2] == 1 && cur->ne[3] == 1;
    ggml_tensor * h = flat ? cur : ggml_reshape_2d(ctx0, ggml_is_contiguous(cur) ? cur : op(ggml_cont(ctx0, cur)), n_embd, n_rows);

    ggml_tensor * out = h;
    if (kinds & KIND_ADD) {
        ggml_tensor * delta = gin.fused ? gin.deltas[sl.index] : nullptr;
        if (!delta) {
            ggml_tensor * sum = ggml_view_2d(ctx0, gr.sum, n_embd, gr.sum->ne[1], gr.sum->nb[1], sl.index * gr.sum->nb[2]);
            delta = op(ggml_get_rows(ctx0, sum, gin.all));
        }
        out = op(ggml_add(ctx0, h, delta));
    }
    if (kinds & KIND_DYN) {
        ggml_tensor * v = ggml_view_2d(ctx0, gr.v, n_embd, st->n_dyn, gr.v->nb[1], sl.index * gr.v->nb[2]);
        ggml_tensor * vt = ggml_view_2d(ctx0, gr.vt, st->n_dyn, n_embd, gr.vt->nb[1], sl.index * gr.vt->nb[2]);
        const auto plane = [&](int64_t n) { return ggml_view_2d(ctx0, gin.g, st->n_dyn, n_rows, gin.g->nb[1], (n * n_slots + sl.index) * gin.g->nb[2]); };

        ggml_tensor * t = op(ggml_mul_mat(ctx0, v, h)); // W^T h: [n_dyn, rows]
        compat::exact(t, 0);
        if (kinds & KIND_KNEE) {
            t = op(ggml_add(ctx0, t, plane(1)));
            t = op(ggml_mul(ctx0, t, op(ggml_step(ctx0, op(ggml_add(ctx0, t, plane(2)))))));
        }
        t = op(ggml_mul(ctx0, t, plane(0)));
        t = op(ggml_mul_mat(ctx0, vt, t)); // V (g o phi(W^T h + b))
        compat::exact(t, 0);
        out = op(ggml_add(ctx0, out, t));
    }
    if (kinds & KIND_RENORM) {
        // out * (1 + w (|h| / |out| - 1)): with w = 0 not a bit changes
        ggml_tensor * w = ggml_view_2d(ctx0, gin.w, 1, n_rows, gin.w->nb[1], sl.index * gin.w->nb[2]);
        ggml_tensor * before = op(ggml_sqrt(ctx0, op(ggml_sum_rows(ctx0, op(ggml_sqr(ctx0, h))))));
        ggml_tensor * after = op(ggml_sum_rows(ctx0, op(ggml_sqr(ctx0, out))));
        after = op(ggml_sqrt(ctx0, op(ggml_scale_bias(ctx0, after, 1.0f, 1e-30f)))); // a state of zero stays what it is
        ggml_tensor * f = op(ggml_scale_bias(ctx0, op(ggml_div(ctx0, before, after)), 1.0f, -1.0f));
        f = op(ggml_scale_bias(ctx0, op(ggml_mul(ctx0, f, w)), 1.0f, 1.0f));
        out = op(ggml_mul(ctx0, out, f));
    }

    in->hooked[sl.at] = true;
    if (st->live) {
        st->stats.n_edit_nodes = in->n_nodes;
    }
    return flat ? out : ggml_reshape_4d(ctx0, out, cur->ne[0], cur->ne[1], cur->ne[2], cur->ne[3]);
}

void build_capture(const llm_graph_context & graph, llama_steer_state * st, input_steer * in, ggml_tensor * cur, size_t ti, bool outputs_only) {
    ggml_context * ctx0 = graph.ctx0;

    auto & tp = st->captures[ti];
    auto & tin = in->captures[ti];

    ggml_tensor * src;
    if (tp.n_streams > tp.n_out) { // mean over the streams
        src = ggml_view_2d(ctx0, cur, cur->ne[0], cur->ne[2], cur->nb[2], 0);
        for (int32_t s = 1; s < tp.n_streams; ++s) {
            src = ggml_add(ctx0, src, ggml_view_2d(ctx0, cur, cur->ne[0], cur->ne[2], cur->nb[2], s * cur->nb[1]));
        }
        src = ggml_scale(ctx0, src, 1.0f / tp.n_streams);
    } else {
        src = ggml_is_contiguous(cur) ? cur : ggml_cont(ctx0, cur);
        src = ggml_reshape_2d(ctx0, src, cur->ne[0], ggml_nrows(cur));
    }

    tin.outputs_only = outputs_only;
    tin.n_out = tp.n_out;
    // captures with the same rows share their index
    for (size_t k = 0; k < in->captures.size(); ++k) {
        const auto & other = in->captures[k];
        if (k != ti && other.idx && other.outputs_only == outputs_only && other.n_out == tp.n_out) {
            tin.idx = other.idx;
            break;
        }
    }
    if (!tin.idx) {
        tin.idx = ggml_new_tensor_1d(ctx0, GGML_TYPE_I64, src->ne[1]);
        ggml_set_input(tin.idx);
        ggml_set_name(tin.idx, "steer_capture_idx");
    }
    ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx0, tp.rows, src, tin.idx));
}

} // namespace

ggml_tensor * llama_steer_build(const llm_graph_context & graph, ggml_tensor * cur, int il, llama_steer_site site) {
    auto * st = static_cast<const llama_steer_cvec *>(graph.cvec)->state.get();
    if (!st || il < 0 || il >= st->n_layer) { // MTP blocks count on from n_layer
        return cur;
    }
    const place at(il, site);
    if (st->probing) {
        note_facts(*st, at, cur, graph.n_tokens, graph.n_outputs);
        return cur;
    }
    auto * in = input_of(graph, st);
    if (in->mode == 0) {
        return cur;
    }

    const auto slot_it = st->slot_of.find(at);
    size_t ti = 0;
    while (ti < st->captures.size() && st->captures[ti].at != at) {
        ti++;
    }
    const bool edit = (in->mode & MODE_EDIT) && slot_it != st->slot_of.end() && in->kinds[slot_it->second] != 0;
    const bool read = (in->mode & MODE_CAPTURE) && ti < st->captures.size();
    if (!edit && !read) {
        return cur;
    }

    const auto & facts = st->facts.at(at);
    if (!is_as_found(graph, cur, facts)) {
        return cur; // the place then does not count as fired or built, which the sequences concerned are told
    }
    if (edit) {
        cur = build_edit(graph, st, in, cur, slot_it->second, facts.gathered);
    }
    if (read) {
        build_capture(graph, st, in, cur, ti, facts.gathered);
    }
    return cur;
}

uint32_t llama_steer_max_nodes(const llama_adapter_cvec & cvec) {
    const auto * st = static_cast<const llama_steer_cvec &>(cvec).state.get();
    return st ? 40u * (uint32_t) st->slots.size() + (8u + 2u * st->n_streams) * (uint32_t) st->captures.size() + 16u : 0u;
}

// ---- one ubatch ----

namespace {

void begin_ubatch(llama_steer_state & st, const llama_ubatch & ub, uint32_t n_outputs) {
    const uint32_t n = ub.n_tokens;
    st.stats.n_ubatches++;
    st.n_tokens = n;
    st.ub_seq.resize(n);
    st.ub_pos.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
        st.ub_seq[i] = ub.seq_id[i][0];
        st.ub_pos[i] = ub.pos[i];
    }

    const int32_t n_cb_all = st.vectors.empty() ? 0 : st.vectors.rbegin()->first + 1;
    std::vector<float> cb_c;
    std::vector<float> cb_g;
    if (st.add_cb && n_cb_all > 0) {
        cb_c.assign((size_t) n * n_cb_all, 0.0f);
        cb_g.assign((size_t) n * n_cb_all, 0.0f);
        llama_steer_tokens tokens = { (int32_t) n, n_cb_all, st.ub_seq.data(), st.ub_pos.data() };
        st.in_callback = true;
        const bool go_on = st.add_cb(&tokens, cb_c.data(), cb_g.data(), st.add_cb_data);
        st.in_callback = false;
        if (!go_on) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the add callback stopped this decode");
        }
        for (size_t i = 0; i < cb_c.size(); ++i) {
            const int32_t k = (int32_t) (i % n_cb_all);
            if (!std::isfinite(cb_c[i]) || !std::isfinite(cb_g[i])) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave vector %d a coefficient that is not finite", k));
            }
            if (!(cb_g[i] >= -LLAMA_STEER_MAX_PROJECT && cb_g[i] <= -LLAMA_STEER_MIN_PROJECT)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave vector %d a g of %g: %g to %g are possible", k, cb_g[i],
                                                              -LLAMA_STEER_MAX_PROJECT, -LLAMA_STEER_MIN_PROJECT));
            }
            if (cb_c[i] == 0.0f && cb_g[i] == 0.0f) {
                continue;
            }
            auto it = st.vectors.find(k);
            if (it == st.vectors.end()) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave a coefficient to vector %d, which is not set", k));
            }
            if (cb_g[i] != 0.0f && !it->second.dyn.count(PART_SELF)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave g to vector %d, which no config projects or clamps", k));
            }
        }
    }

    auto config_of = [&](llama_seq_id seq, llama_pos pos) {
        auto it = st.ranges.find(seq);
        return it == st.ranges.end() ? 0 : it->second.at(pos);
    };
    auto wants = [&](llama_seq_id seq, llama_pos pos) {
        auto it = st.wanted.find(seq);
        return it != st.wanted.end() && it->second.at(pos);
    };

    const auto fail = [&](uint32_t i, int32_t code, const std::string & what) { // of one token: others are computed as they should be
        for (int32_t s = 0; s < ub.n_seq_id[i]; ++s) {
            st.seq_error(ub.seq_id[i][s], code, what);
        }
    };
    st.row_waited = false;
    st.row_idx.assign((size_t) n * st.n_streams, 0);
    st.capture_idx.assign(n, -1);
    st.capture_at.clear();
    st.uses.clear();
    bool any_edit = false;
    for (uint32_t i = 0; i < n; ++i) {
        const int32_t cfg = config_of(st.ub_seq[i], st.ub_pos[i]);
        llama_seq_id reader = -1; // the sequence that wants to read the token; a shared token may be wanted by any of its own
        for (int32_t s = 0; s < ub.n_seq_id[i] && reader < 0 && !st.captures.empty(); ++s) {
            reader = wants(ub.seq_id[i][s], st.ub_pos[i]) ? ub.seq_id[i][s] : -1;
        }
        for (int32_t s = 1; s < ub.n_seq_id[i]; ++s) {
            const int32_t other = config_of(ub.seq_id[i][s], st.ub_pos[i]);
            const auto id = [&](int32_t c) { auto it = st.configs.find(c); return it == st.configs.end() ? 0 : it->second.id; };
            if (other != cfg && id(other) != id(cfg)) {
                fail(i, LLAMA_STEER_ERR_ARG, format("sequences %d and %d share the token at position %d but not its steering", st.ub_seq[i], ub.seq_id[i][s], st.ub_pos[i]));
            }
        }

        const float * c = nullptr;
        const float * g = nullptr;
        int32_t n_cb = 0;
        if (!cb_c.empty()) {
            c = cb_c.data() + (size_t) i * n_cb_all;
            g = cb_g.data() + (size_t) i * n_cb_all;
            for (int32_t k = 0; k < n_cb_all; ++k) {
                n_cb = c[k] != 0.0f || g[k] != 0.0f ? k + 1 : n_cb;
            }
        }
        auto it = st.configs.find(cfg);
        const bool none = it == st.configs.end() || it->second.id == 0;
        if (!none) {
            auto & use = st.uses[cfg];
            use.output = use.output || n_outputs == n || ub.output[i];
            use.sequences.insert(ub.seq_id[i], ub.seq_id[i] + ub.n_seq_id[i]);
        }
        if ((!none || n_cb > 0) && !st.slots.empty()) {
            const bool by_stream = it != st.configs.end() && it->second.by_stream();
            try {
                for (int32_t s = 0; s < st.n_streams; ++s) {
                    const int32_t r = by_stream || s == 0 ? row_for(st, cfg, by_stream ? s : -1, c, g, n_cb) : st.row_idx[(size_t) i * st.n_streams];
                    st.row_idx[(size_t) i * st.n_streams + s] = r;
                    any_edit = any_edit || r != 0;
                }
            } catch (const steer_error & e) {
                if (n_cb > 0) {
                    throw; // the callback is the context's own, and so is its fault
                }
                std::fill_n(st.row_idx.begin() + (size_t) i * st.n_streams, st.n_streams, 0);
                st.uses.erase(cfg);
                fail(i, e.code, e.what());
            }
        }

        if (reader >= 0 && (int32_t) st.capture_at.size() >= st.capture_rows) {
            st.seq_error(reader, LLAMA_STEER_ERR_LIMIT, format("more than %d tokens of one ubatch are to be read: give the captures more rows", st.capture_rows));
            reader = -1;
        }
        for (const auto & tp : st.captures) {
            if (reader >= 0 && tp.last && n_outputs != n && !ub.output[i]) {
                st.seq_error(reader, LLAMA_STEER_ERR_ARG, format("layer %d holds output tokens only: position %d of sequence %d is no output and cannot be read there", tp.at.first, st.ub_pos[i], st.ub_seq[i]));
                reader = -1;
            }
        }
        if (reader >= 0) {
            st.capture_idx[i] = (int32_t) st.capture_at.size();
            st.capture_at.emplace_back(reader, st.ub_pos[i]);
        }
    }

    // The graph does what the rows ask for, and what the last ones did: requests that take turns must not rebuild it each time.
    st.n_edits += any_edit;
    st.kinds.assign(st.slots.size(), 0);
    st.kind_used.resize(st.slots.size());
    const std::set<int32_t> rows(st.row_idx.begin(), st.row_idx.end());
    for (size_t k = 0; any_edit && k < st.slots.size(); ++k) {
        for (size_t b = 0; b < st.kind_used[k].size(); ++b) {
            uint64_t & used = st.kind_used[k][b];
            for (const int32_t r : rows) {
                used = r != 0 && (st.rows[r].kinds[k] >> b & 1) ? st.n_edits : used;
            }
            st.kinds[k] |= used != 0 && st.n_edits - used < KIND_KEPT ? 1 << b : 0;
        }
    }
    st.capture_built = true;
    st.mode = (any_edit ? MODE_EDIT : 0) | (st.capture_at.empty() ? 0 : MODE_CAPTURE);
    st.live = true;
}

// Each place of a config must have been passed by its tokens: a silent no-op is the worst failure of steering.
void prove(llama_steer_state & st) {
    for (const auto & [id, use] : st.uses) {
        auto c = st.configs.find(id);
        if (c == st.configs.end()) {
            continue; // a callback took it away
        }
        for (const auto & [at, n] : c->second.fired) {
            if (n == 0 && (use.output || !st.gathered(at))) {
                for (llama_seq_id seq : use.sequences) {
                    st.seq_error(seq, LLAMA_STEER_ERR_ARCH, format("steering was asked for at layer %d (%s), but this model never passed through that hook: "
                                                                   "leave the layer out, and please report the architecture",
                                                                   at.first, site_name(at.second)));
                }
            }
        }
    }
}

void finish_ubatch(llama_steer_state & st) {
    prove(st);
    if (st.capture_at.empty()) {
        return;
    }
    if (!st.capture_built) {
        for (const auto & [seq, pos] : st.capture_at) {
            st.seq_error(seq, LLAMA_STEER_ERR_ARCH, format("position %d was to be read at a layer that this model did not pass through: leave the layer out, and please "
                                                           "report the architecture",
                                                           pos));
        }
        return;
    }
    ggml_backend_sched_synchronize(st.ctx.get_sched());

    const size_t n = st.capture_at.size();
    std::vector<llama_seq_id> seq;
    std::vector<llama_pos> pos;
    for (const auto & [s, p] : st.capture_at) {
        seq.push_back(s);
        pos.push_back(p);
    }
    std::vector<std::vector<float>> data(st.captures.size());
    for (size_t i = 0; i < st.captures.size(); ++i) {
        auto & tp = st.captures[i];
        data[i].resize(n * tp.n_out * st.n_embd);
        ggml_backend_tensor_get(tp.rows, data[i].data(), 0, data[i].size() * sizeof(float));
        if (st.read_cb) {
            llama_steer_rows rows = { tp.at.first, tp.at.second, (int32_t) n, tp.n_out, st.n_embd, seq.data(), pos.data(), data[i].data() };
            st.in_callback = true;
            const bool go_on = st.read_cb(&rows, st.read_cb_data);
            st.in_callback = false;
            if (!go_on) {
                throw steer_error(LLAMA_STEER_ERR_ARG, "the read callback stopped this decode");
            }
        }
    }
    if (st.capture_keep) {
        // all or nothing: room first, so that no capture can end up with more rows than another
        for (size_t i = 0; i < st.captures.size(); ++i) {
            auto & kept = st.captures[i].kept;
            if (kept.capacity() < kept.size() + data[i].size()) {
                kept.reserve(std::max(2 * kept.capacity(), kept.size() + data[i].size()));
            }
        }
        st.kept_at.insert(st.kept_at.end(), st.capture_at.begin(), st.capture_at.end());
        for (size_t i = 0; i < st.captures.size(); ++i) {
            st.captures[i].kept.insert(st.captures[i].kept.end(), data[i].begin(), data[i].end());
        }
    }
}

} // namespace

llama_steer_ubatch::llama_steer_ubatch(llama_context & ctx, const llama_ubatch & ubatch, uint32_t n_outputs)
    : ctx(ctx) {
    state = llama_steer_access::cvec(ctx).state.get();
    if (!state) {
        return;
    }
    ok = guarded(&ctx, [&]() { begin_ubatch(*state, ubatch, n_outputs); }) == LLAMA_STEER_OK;
    if (!ok) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, state->error.c_str());
    }
}

llama_steer_ubatch::~llama_steer_ubatch() {
    if (state) {
        state->live = false;
        state->want_all();
    }
}

bool llama_steer_ubatch::finish() {
    if (!state) {
        return true;
    }
    const bool res = guarded(&ctx, [&]() { finish_ubatch(*state); }) == LLAMA_STEER_OK;
    if (!res) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, state->error.c_str());
    }
    return res;
}
