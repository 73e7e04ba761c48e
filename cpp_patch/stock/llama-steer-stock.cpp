// llama-steer-stock.cpp - see llama-steer-stock.h.

#include "llama-steer-stock.h"

#include "../llama-steer-state.h"

#include <cstdlib>

namespace {

// The beginning of ggml_tensor, and what stands around its name. Both are as old as ggml-backend; is_as_known() looks whether they hold.
struct node_head {
    int32_t type;
    void * buffer;
    int64_t ne[4];
    size_t nb[4];
};
struct node_tail {
    void * src[10];
    void * view_src;
    size_t view_offs;
    void * data;
    char name[64];
};

constexpr int32_t REAL_F32 = 0; // GGML_TYPE_F32

struct seen_node {
    place at;
    int64_t ne[4];
};

struct stock_model : llama_model {
    llama_steer_stock_calls calls;
    int32_t n_tokens;
    int32_t n_outputs;
    std::vector<seen_node> seen;
    std::vector<float> mark;  // a control vector that the library was told to look for it; [n_layer - 1][n_embd]
    std::set<int32_t> marked; // layers whose nodes were seen to add it

    bool has_cvec() const { return calls.set_cvec && hparams.layers > 1 && marked.size() == hparams.layers - 1; }

    const node_head & head(const void * node) const { return *static_cast<const node_head *>(node); }

    const node_tail & tail(const void * node) const {
        return *reinterpret_cast<const node_tail *>(calls.get_name(node) - offsetof(node_tail, name));
    }

    // float32, dense, and of a structure that we know?
    bool is_as_known(const void * node) const {
        const auto & h = head(node);
        size_t size = sizeof(float);
        for (int i = 0; i < 4; ++i) {
            if (h.ne[i] < 0 || (h.ne[i] > 1 && h.nb[i] != size)) {
                return false;
            }
            size *= h.ne[i];
        }
        return h.type == REAL_F32 && size == calls.nbytes(node) && calls.is_contiguous(node);
    }

    // What a node was made of: of an add, what was added. Null where the structure is not the one that we know.
    void * added(const void * node) const {
        const auto & t = tail(node);
        return t.data == calls.get_data(node) && t.src[0] ? t.src[1] : nullptr;
    }

    bool holds(const void * node, const float * row) const {
        const size_t size = hparams.n_embd * sizeof(float);
        if (head(node).ne[0] != (int64_t) hparams.n_embd || !is_as_known(node) || calls.nbytes(node) != size) {
            return false;
        }
        std::vector<float> held(hparams.n_embd);
        calls.tensor_get(node, held.data(), 0, size);
        return std::equal(held.begin(), held.end(), row);
    }

    // The place whose state a node is, by its name: "l_out-7". layer -1: none.
    place place_of(const void * node) const {
        static constexpr struct {
            const char * name;
            int32_t site;
        } NAMES[] = {
            { "l_out-", LLAMA_STEER_RESID_POST },
            { "l_last-", LLAMA_STEER_RESID_POST }, // where there are several streams
            { "attn_out-", LLAMA_STEER_ATTN_OUT },
            { "ffn_out-", LLAMA_STEER_FFN_OUT },
        };
        const char * name = calls.get_name(node);
        if (name[0] != 'l' && name[0] != 'a' && name[0] != 'f') { // most of them
            return place(-1, 0);
        }
        for (const auto & one : NAMES) {
            const size_t n = strlen(one.name);
            if (strncmp(name, one.name, n) != 0 || name[n] < '0' || name[n] > '9') {
                continue;
            }
            // what is written to the residual stream is known of one architecture only
            if (one.site != LLAMA_STEER_RESID_POST && arch != "deepseek4") {
                break;
            }
            char * end;
            const long il = strtol(name + n, &end, 10);
            return *end == '\0' && il < (long) hparams.layers ? place((int32_t) il, one.site) : place(-1, 0);
        }
        return place(-1, 0);
    }
};

// What is done at one place in the batch that is being computed.
struct job {
    place at;
    ggml_tensor * in = nullptr;
    ggml_tensor * out = nullptr;
    std::vector<ggml_tensor *> reads; // what else is to be computed from it
    bool by_cvec = false;             // the control vector adds the same, if the graph has it
    bool asked = false;               // for the real state
    bool done = false;
};

// The library's control vector: its tensors are found in the graph, and written to from then on, as each call would have the
// library reserve its compute buffers again.
struct control_vector {
    std::vector<std::vector<float>> data; // [n_layer][n_embd], what the tensors hold; empty: nothing
    std::vector<void *> tensors;          // [n_layer], null: not found
    bool told = false;                    // the library was told, so that graphs have them
    bool used = false;                    // in this batch
    bool broken = false;                  // the library refused it
    const void * last = nullptr;          // config that all tokens of the batch before had
    int64_t last_row = -1;
};

struct stock_context : llama_context {
    explicit stock_context(const stock_model & model)
        : llama_context(model), stock(model) {}

    const stock_model & stock;
    void * real = nullptr;
    bool one_sequence = false;

    std::vector<job> jobs;
    std::map<place, size_t> job_of;
    std::vector<int32_t> job_at; // [n_layer] of resid_post, -1 none
    bool any_site = false;       // there are jobs at other sites
    ggml_context graph_context;
    ggml_cgraph graph;
    std::unique_ptr<llm_graph_result> result;
    std::unique_ptr<llama_steer_ubatch> guard;
    bool active = false;
    std::string failure; // in the callback, which nothing may leave
    control_vector cv;
    llama_steer_stock_stats stats = {};

    llm_graph_context new_graph(int64_t n_tokens, int64_t n_outputs) {
        graph_context.tensors.clear();
        graph.nodes.clear();
        result = std::make_unique<llm_graph_result>();
        return { n_tokens, n_outputs, cvec.get(), &graph_context, &graph, result.get() };
    }

    void graph_reserve(uint32_t, uint32_t, uint32_t, const llama_memory_context *, bool) override {
        const auto g = new_graph(stock.n_tokens, stock.n_outputs);
        for (const auto & node : stock.seen) {
            ggml_tensor * in = ggml_new_tensor_3d(g.ctx0, GGML_TYPE_F32, node.ne[0], node.ne[1], node.ne[2]);
            in->ne[3] = node.ne[3];
            llama_steer_build(g, in, node.at.first, (llama_steer_site) node.at.second);
        }
        graph_context.tensors.clear();
    }

    // ---- the control vector ----

    // What it would hold, if all that happens in this batch is that every token gets the same added; else nothing.
    std::vector<std::vector<float>> same_for_all(const llama_steer_state & st) const {
        if (!stock.has_cvec() || cv.broken || st.mode != MODE_EDIT || st.n_streams != 1) {
            return {};
        }
        const int32_t r = st.row_idx.empty() ? 0 : st.row_idx[0];
        if (r == 0 || std::any_of(st.row_idx.begin(), st.row_idx.end(), [&](int32_t other) { return other != r; })) {
            return {};
        }
        std::vector<std::vector<float>> res(st.n_layer);
        for (size_t k = 0; k < st.slots.size(); ++k) {
            const auto & sl = st.slots[k];
            if (st.rows[r].kinds[k] == 0) {
                continue;
            }
            if (st.rows[r].kinds[k] != KIND_ADD || sl.at.second != LLAMA_STEER_RESID_POST || sl.at.first == 0) {
                return {};
            }
            const auto * sum = st.groups[sl.group].sum;
            auto & row = res[sl.at.first];
            row.resize(st.n_embd);
            ggml_backend_tensor_get(sum, row.data(), sl.index * sum->nb[2] + r * sum->nb[1], st.n_embd * sizeof(float));
        }
        return res;
    }

    void write(int32_t il, const std::vector<float> & row) {
        stock.calls.synchronize(real); // an earlier decode may still be reading it
        stock.calls.tensor_set(cv.tensors[il], row.data(), 0, row.size() * sizeof(float));
        cv.data[il] = row;
    }

    // Let it hold this, or zeros where there is nothing.
    void set_cvec(const std::vector<std::vector<float>> & wanted) {
        const int32_t n_layer = (int32_t) stock.hparams.layers;
        const std::vector<float> zeros(stock.hparams.n_embd, 0.0f);
        cv.used = !wanted.empty();
        if (!cv.told && wanted.empty()) {
            return;
        }
        cv.data.resize(n_layer);
        cv.tensors.resize(n_layer);
        bool tell = !cv.told;
        for (int32_t il = 1; il < n_layer; ++il) {
            const bool here = !wanted.empty() && !wanted[il].empty();
            tell = tell || (!cv.tensors[il] && (here || !cv.data[il].empty()));
        }
        if (!tell) {
            for (int32_t il = 1; il < n_layer; ++il) {
                const bool here = !wanted.empty() && !wanted[il].empty();
                if (here && cv.data[il] != wanted[il]) {
                    write(il, wanted[il]);
                } else if (!here && !cv.data[il].empty()) {
                    write(il, zeros);
                    cv.data[il].clear();
                }
            }
            return;
        }
        std::vector<float> all((size_t) (n_layer - 1) * stock.hparams.n_embd, 0.0f);
        for (int32_t il = 1; il < n_layer && !wanted.empty(); ++il) {
            std::copy(wanted[il].begin(), wanted[il].end(), all.begin() + (size_t) (il - 1) * stock.hparams.n_embd);
        }
        stats.n_cvec_set++;
        if (stock.calls.set_cvec(real, all.data(), all.size(), stock.hparams.n_embd, 1, n_layer) != 0) {
            cv.broken = true;
            cv.used = false;
            return;
        }
        cv.told = true;
        cv.data = wanted.empty() ? std::vector<std::vector<float>>(n_layer) : wanted;
        std::fill(cv.tensors.begin(), cv.tensors.end(), nullptr);
    }

    // Does the graph add the control vector to make this node? Then it has been added when the node is computed.
    bool adds_cvec(const void * node, int32_t il) {
        void * dir = stock.added(node);
        if (!dir || cv.tensors[il]) {
            return dir && dir == cv.tensors[il];
        }
        if (cv.data[il].empty() || !stock.holds(dir, cv.data[il].data())) {
            return false;
        }
        cv.tensors[il] = dir;
        return true;
    }

    // ---- one batch ----

    void begin(int32_t n_tokens, const llama_pos * pos, const int32_t * n_seq_id, llama_seq_id * const * seq_id, const int8_t * output) {
        const llama_ubatch ub = { (uint32_t) n_tokens, pos, n_seq_id, seq_id, output };
        int64_t n_outputs = 0;
        for (int32_t i = 0; i < n_tokens; ++i) {
            n_outputs += output[i] != 0;
        }
        guard = std::make_unique<llama_steer_ubatch>(*this, ub, (uint32_t) n_outputs);
        if (!guard->ok) {
            throw steer_error(LLAMA_STEER_ERR_ARG, guard->state->error);
        }
        auto * st = guard->state;
        if (!st || st->mode == 0) {
            set_cvec({});
            return;
        }
        for (int32_t i = 0; one_sequence && i < n_tokens; ++i) {
            if (n_seq_id[i] != 1 || seq_id[i][0] != seq_id[0][0]) {
                throw steer_error(LLAMA_STEER_ERR_ARG, "this model's cache parts a batch by its sequences: beside an unmodified llama.cpp they are steered "
                                                       "and read one after another, in batches of their own");
            }
        }
        active = true;
        stats.n_batches++;
        // a steering that comes back is worth it, one that changes with every token is not
        auto same = same_for_all(*st);
        const int64_t row = same.empty() ? -1 : st->row_idx[0];
        if (!cv.told && row != cv.last_row) {
            same.clear();
        }
        cv.last_row = row;
        set_cvec(same);
        stats.n_cvec += cv.used;

        const auto g = new_graph(n_tokens, n_outputs);
        std::set<place> places;
        for (const auto & sl : st->slots) {
            places.insert(sl.at);
        }
        for (const auto & tp : st->captures) {
            places.insert(tp.at);
        }
        for (const auto & at : places) {
            const int32_t n_streams = st->streams_at(at);
            const int64_t n_rows = st->gathered(at) ? n_outputs : n_tokens;
            job j;
            j.at = at;
            j.in = n_streams > 1 ? ggml_new_tensor_3d(g.ctx0, GGML_TYPE_F32, st->n_embd, n_streams, n_rows)
                                 : ggml_new_tensor_2d(g.ctx0, GGML_TYPE_F32, st->n_embd, n_rows);
            const size_t before = graph.nodes.size();
            j.out = llama_steer_build(g, j.in, at.first, (llama_steer_site) at.second);
            for (size_t k = before; k < graph.nodes.size(); ++k) {
                if (graph.nodes[k]->src[2]) { // rows that are read
                    j.reads.push_back(graph.nodes[k]);
                }
            }
            if (j.out == j.in && j.reads.empty()) {
                continue;
            }
            j.done = n_rows == 0;
            j.by_cvec = cv.used && j.reads.empty();
            if (at.second == LLAMA_STEER_RESID_POST) {
                job_at[at.first] = (int32_t) jobs.size();
            } else {
                any_site = true;
            }
            job_of[at] = jobs.size();
            jobs.push_back(std::move(j));
        }
        for (auto & input : result->inputs) {
            input->set_input(&ub);
        }
    }

    bool eval(void * node, bool ask) {
        const place at = stock.place_of(node);
        if (at.first < 0 || (at.second == LLAMA_STEER_RESID_POST ? job_at[at.first] < 0 : !any_site || !job_of.count(at))) {
            return !ask;
        }
        job & j = jobs[job_of.at(at)];
        if (ask) {
            const auto & h = stock.head(node);
            if (j.done || !stock.is_as_known(node) || h.ne[0] != j.in->ne[0] || h.ne[1] != j.in->ne[1] || h.ne[2] != j.in->ne[2] || h.ne[3] != 1) {
                if (j.done && j.in->ne[j.in->ne[2] > 1 ? 2 : 1] != 0) {
                    j.done = false; // passed twice: which is it?
                    j.asked = true;
                }
                return false;
            }
            if (j.by_cvec && adds_cvec(node, at.first)) {
                j.done = true;
                return false;
            }
            return !j.asked;
        }
        const size_t size = stock.calls.nbytes(node);
        stock.calls.tensor_get(node, j.in->data, 0, size);
        for (auto * t : j.reads) {
            ggml_compute_now(t);
        }
        if (j.out != j.in) {
            ggml_compute_now(j.out);
            stock.calls.tensor_set(node, j.out->data, 0, size);
            stats.n_edits++;
        }
        j.done = true;
        return true;
    }

    void end(bool computed) {
        if (!active) {
            guard.reset();
            return;
        }
        auto * st = guard->state;
        bool read_all = true;
        for (const auto & j : jobs) {
            if (j.done || !computed) {
                continue;
            }
            read_all = read_all && j.reads.empty();
            for (const auto & [id, use] : st->uses) {
                const auto c = st->configs.find(id);
                for (llama_seq_id seq : use.sequences) {
                    if (j.out != j.in && c != st->configs.end() && c->second.fired.count(j.at)) {
                        st->seq_error(seq, LLAMA_STEER_ERR_ARCH, format("steering was asked for at layer %d (%s), but its state did not pass as it was found before: "
                                                                        "leave the layer out, or use the patched runtime (`steer build`)",
                                                                        j.at.first, site_name(j.at.second)));
                    }
                }
            }
        }
        st->capture_built = st->capture_built && read_all;
        const std::string what = failure;
        const bool ok = !computed || !what.empty() || guard->finish();
        const std::string error = st->error;
        clear();
        if (!what.empty()) {
            throw steer_error(LLAMA_STEER_ERR_INTERNAL, what);
        }
        if (!ok) {
            throw steer_error(LLAMA_STEER_ERR_ARG, error);
        }
    }

    void clear() {
        guard.reset();
        active = false;
        any_site = false;
        failure.clear();
        jobs.clear();
        job_of.clear();
        std::fill(job_at.begin(), job_at.end(), -1);
        result.reset();
        graph.nodes.clear();
        graph_context.tensors.clear();
    }
};

} // namespace

llama_model * llama_steer_stock_model_new(const llama_steer_stock_calls * calls, const char * arch, int32_t n_layer, int32_t n_embd, int32_t n_tokens, int32_t n_outputs) {
    stock_model * res = nullptr;
    guarded(nullptr, [&]() {
        if (!calls || !arch || n_layer < 1 || n_embd < 1 || n_outputs < 1 || n_tokens <= n_outputs) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "a model needs calls, an architecture, layers and a batch to look at");
        }
        auto model = std::make_unique<stock_model>();
        model->calls = *calls;
        model->arch = arch;
        model->hparams.layers = n_layer;
        model->hparams.n_embd = n_embd;
        model->n_tokens = n_tokens;
        model->n_outputs = n_outputs;
        if (!is_tested(model->arch)) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, format("architecture '%s' has not been tested with steering", arch));
        }
        res = model.release();
    });
    return res;
}

void llama_steer_stock_model_free(llama_model * model) {
    delete model;
}

bool llama_steer_stock_look(void * tensor, bool ask, void * model) {
    if (!ask) {
        return true;
    }
    guarded(nullptr, [&]() {
        auto & st = *static_cast<stock_model *>(static_cast<llama_model *>(model));
        const place at = st.place_of(tensor);
        if (at.first < 0) {
            return;
        }
        if (!st.mark.empty()) {
            const void * dir = at.second == LLAMA_STEER_RESID_POST && at.first > 0 ? st.added(tensor) : nullptr;
            if (dir && st.holds(dir, st.mark.data() + (size_t) (at.first - 1) * st.hparams.n_embd)) {
                st.marked.insert(at.first);
            }
            return;
        }
        const auto & h = st.head(tensor);
        seen_node node = { at, { h.ne[0], h.ne[1], h.ne[2], h.ne[3] } };
        if (!st.is_as_known(tensor)) {
            node.ne[0] = 0; // of no use
        }
        st.seen.push_back(node);
    });
    return false;
}

void llama_steer_stock_mark(llama_model * model, void * real) {
    guarded(nullptr, [&]() {
        auto & st = *static_cast<stock_model *>(model);
        if (!st.calls.set_cvec || st.hparams.layers < 2) {
            return;
        }
        st.mark.resize((size_t) (st.hparams.layers - 1) * st.hparams.n_embd);
        for (size_t i = 0; i < st.mark.size(); ++i) {
            st.mark[i] = (float) (i % 8191 + 1) / 8192.0f;
        }
        if (st.calls.set_cvec(real, st.mark.data(), st.mark.size(), st.hparams.n_embd, 1, st.hparams.layers) != 0) {
            st.calls.set_cvec = nullptr;
        }
    });
}

llama_context * llama_steer_stock_new(llama_model * model, int32_t n_batch, int32_t n_seq_max, bool one_sequence) {
    llama_context * res = nullptr;
    guarded(nullptr, [&]() {
        auto ctx = std::make_unique<stock_context>(*static_cast<stock_model *>(model));
        ctx->batch_size = (uint32_t) std::max(1, n_batch);
        ctx->sequences = (uint32_t) std::max(1, n_seq_max);
        ctx->one_sequence = one_sequence;
        ctx->cvec = llama_steer_make_cvec();
        ctx->job_at.assign(ctx->stock.hparams.layers, -1);
        res = ctx.release();
    });
    return res;
}

void llama_steer_stock_bind(llama_context * ctx, void * real) {
    static_cast<stock_context *>(ctx)->real = real;
}

void llama_steer_stock_free(llama_context * ctx) {
    delete ctx;
}

bool llama_steer_stock_eval(void * tensor, bool ask, void * ctx) {
    auto & st = *static_cast<stock_context *>(static_cast<llama_context *>(ctx));
    if (!st.active || !st.failure.empty()) {
        return !ask;
    }
    bool res = !ask;
    try {
        res = st.eval(tensor, ask);
    } catch (const std::exception & e) {
        st.failure = e.what();
    }
    return res;
}

int32_t llama_steer_stock_begin(llama_context * ctx, int32_t n_tokens, const llama_pos * pos, const int32_t * n_seq_id, llama_seq_id * const * seq_id, const int8_t * output) {
    auto & st = *static_cast<stock_context *>(ctx);
    const int32_t code = guarded(ctx, [&]() {
        st.clear(); // of a batch that was broken off
        if (n_tokens < 1 || !pos || !n_seq_id || !seq_id || !output) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "a batch needs positions, sequences and outputs");
        }
        if (n_tokens > (int32_t) st.batch_size) {
            throw steer_error(LLAMA_STEER_ERR_LIMIT, format("a batch of %d tokens would be computed in parts of %d", n_tokens, (int32_t) st.batch_size));
        }
        st.begin(n_tokens, pos, n_seq_id, seq_id, output);
    });
    if (code != LLAMA_STEER_OK) {
        st.clear();
    }
    return code;
}

int32_t llama_steer_stock_end(llama_context * ctx, bool computed) {
    auto & st = *static_cast<stock_context *>(ctx);
    const int32_t code = guarded(ctx, [&]() { st.end(computed); });
    st.clear();
    return code;
}

void llama_steer_stock_get_stats(const llama_context * ctx, llama_steer_stock_stats * out) {
    *out = static_cast<const stock_context *>(ctx)->stats;
}
