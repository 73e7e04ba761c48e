// llama-steer.cpp - the C API; see llama-steer.h for what it does and README.md for how it is hooked in.

#include "llama-steer-state.h"

llama_steer_cvec::llama_steer_cvec() = default;
llama_steer_cvec::~llama_steer_cvec() = default;

std::shared_ptr<llama_adapter_cvec> llama_steer_make_cvec() {
    return std::make_shared<llama_steer_cvec>();
}

namespace llama_steer {

static thread_local std::string error_without_context = "no error";

llama_steer_state * state_of(const llama_context * ctx) {
    return ctx ? llama_steer_access::cvec(*ctx).state.get() : nullptr;
}

void set_error(llama_context * ctx, const std::string & what) {
    if (auto * st = state_of(ctx)) {
        st->error = what;
    }
    error_without_context = what;
}

llama_steer_state & state_for(llama_context * ctx) {
    if (!ctx) {
        throw steer_error(LLAMA_STEER_ERR_ARG, "the context is NULL");
    }
    auto & cvec = llama_steer_access::cvec(*ctx);
    if (!cvec.state) {
        const auto & model = ctx->get_model();
        if (!is_tested(model.arch)) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, format("architecture '%s' has not been tested with steering", llm_arch_name(model.arch)));
        }
        if (!compat::is_main(ctx->get_cparams(), 0)) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, "a draft (MTP) context cannot be steered: steer the context of the main model");
        }
        if (compat::no_alloc(model.hparams, 0)) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, "the model was loaded without its weights (no_alloc), so nothing can be steered");
        }
        // graphs built so far, which do not know that they may have to give way to a steered one, are dropped by this
        ctx->synchronize();
        cvec.state = std::make_unique<llama_steer_state>(*ctx);
        try {
            find_facts(*cvec.state);
        } catch (...) {
            cvec.state.reset();
            llama_steer_access::reserve_later(*ctx);
            throw;
        }
    }
    return *cvec.state;
}

} // namespace llama_steer

const char * llama_steer_version(void) {
    static const std::string version = "llama-steer " + std::to_string(LLAMA_STEER_API_VERSION);
    return version.c_str();
}

const char * llama_steer_error(const llama_context * ctx) {
    const auto * st = state_of(ctx);
    return st ? st->error.c_str() : error_without_context.c_str();
}

int32_t llama_steer_vector_set(llama_context * ctx, int32_t vector_id, int32_t n, const int32_t * layers, const int32_t * sites, const float * dirs, const double * scales) {
    llama_steer_vector vector = {};
    vector.n = n;
    vector.layers = layers;
    vector.sites = sites;
    vector.dirs = dirs;
    vector.scales = scales;
    return llama_steer_vector_put(ctx, vector_id, &vector);
}

int32_t llama_steer_vector_put(llama_context * ctx, int32_t vector_id, const llama_steer_vector * vector) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (!vector) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the vector is NULL");
        }
        set_vector(st, vector_id, *vector, true);
    });
}

int32_t llama_steer_vector_clear(llama_context * ctx, int32_t vector_id) {
    return guarded(ctx, [&]() { clear_vector(state_for(ctx), vector_id); });
}

int32_t llama_steer_config_set(llama_context * ctx, int32_t config_id, int32_t n_terms, const llama_steer_term * terms) {
    return guarded(ctx, [&]() { set_config(state_for(ctx), config_id, n_terms, terms); });
}

int32_t llama_steer_config_clear(llama_context * ctx, int32_t config_id) {
    return guarded(ctx, [&]() { clear_config(state_for(ctx), config_id); });
}

int32_t llama_steer_range(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, int32_t config_id) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (seq < 0 || p0 < 0 || (p1 >= 0 && p1 <= p0)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("sequence %d, positions %d to %d is no range", seq, p0, p1));
        }
        if (config_id != 0 && !st.configs.count(config_id)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("config %d is not set", config_id));
        }
        auto ranges = st.ranges;
        ranges[seq].set(p0, p1, config_id);
        if (auto from = st.applied_from.find(seq); from != st.applied_from.end()) {
            from->second = std::min(from->second, p0);
        }
        if (config_id != 0) {
            reserve_rows(st, ranges);
        }
        st.ranges = std::move(ranges);
    });
}

int32_t llama_steer_seq_clear(llama_context * ctx, llama_seq_id seq) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (seq < 0) {
            st.ranges.clear();
            st.applied_from.clear();
            st.wanted.clear();
            st.seq_errors.clear();
        } else {
            st.ranges.erase(seq);
            st.applied_from.erase(seq);
            st.wanted.erase(seq);
            st.seq_errors.erase(seq);
        }
        if (st.ranges.empty()) {
            give_back_rows(st);
        }
    });
}

uint64_t llama_steer_config_id(const llama_context * ctx, int32_t config_id) {
    const auto * st = state_of(ctx);
    if (!st) {
        return 0;
    }
    auto it = st->configs.find(config_id);
    return it == st->configs.end() ? 0 : it->second.id;
}

bool llama_steer_config_acts(const llama_context * ctx, int32_t config_id, int32_t il, int32_t site) {
    const auto * st = state_of(ctx);
    if (!st) {
        return false;
    }
    auto it = st->configs.find(config_id);
    return it != st->configs.end() && it->second.fired.count(place(il, site)) > 0;
}

uint64_t llama_steer_edit_id(const llama_context * ctx, llama_seq_id seq, llama_pos pos) {
    const auto * st = state_of(ctx);
    if (!st) {
        return 0;
    }
    auto it = st->ranges.find(seq);
    return it == st->ranges.end() ? 0 : llama_steer_config_id(ctx, it->second.at(pos));
}

int32_t llama_steer_capture_set(llama_context * ctx, int32_t n, const int32_t * layers, const int32_t * sites, int32_t stream_mode, int32_t n_rows, bool keep) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        st.not_in_callback("changing the captures");
        // a split takes at least one token of each sequence, so a ubatch can hold more than n_ubatch
        const int32_t n_ubatch = (int32_t) std::max(st.ctx.n_ubatch(), st.ctx.n_seq_max());
        if (n < 0 || n > st.n_layer * LLAMA_STEER_SITE_COUNT || (n > 0 && (!layers || !sites))) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("0 to %d captures can be set, not %d", st.n_layer * LLAMA_STEER_SITE_COUNT, n));
        }
        if (stream_mode != LLAMA_STEER_STREAM_MEAN && stream_mode != LLAMA_STEER_STREAM_ALL) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("stream mode %d does not exist: read the mean or all", stream_mode));
        }
        if (n_rows < 0) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("captures cannot hold %d rows", n_rows));
        }
        n_rows = n_rows == 0 ? n_ubatch : std::min(n_rows, n_ubatch);

        // asking for the same captures again is the usual case, and costs nothing
        bool same = n == (int32_t) st.captures.size() && n_rows <= st.capture_rows && stream_mode == st.capture_stream;
        for (int32_t i = 0; same && i < n; ++i) {
            same = st.captures[i].at == place(layers[i], sites[i]);
        }
        if (same) {
            st.capture_keep = keep;
            drop_kept(st);
            return;
        }

        std::vector<capture> captures;
        for (int32_t i = 0; i < n; ++i) {
            st.check_place(layers[i], sites[i]);
            capture tp;
            tp.at = place(layers[i], sites[i]);
            tp.n_streams = st.streams_at(tp.at);
            tp.n_out = stream_mode == LLAMA_STEER_STREAM_ALL ? tp.n_streams : 1;
            tp.last = st.gathered(tp.at);
            for (const auto & other : captures) {
                if (other.at == tp.at) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("layer %d, %s is captured twice", layers[i], site_name(sites[i])));
                }
            }
            tp.ctx = new_tensor_context(1);
            tp.rows = ggml_new_tensor_2d(tp.ctx.get(), GGML_TYPE_F32, st.n_embd, (int64_t) (n_rows + 1) * tp.n_out);
            ggml_set_name(tp.rows, "steer_capture");
            tp.buf = allocate(tp.ctx.get(), st.model.select_buft(layers[i]), false, "rows to read");
            captures.push_back(std::move(tp));
        }

        st.ctx.synchronize();
        std::swap(st.captures, captures);
        const auto old_rows = st.capture_rows;
        const auto old_stream = st.capture_stream;
        st.capture_rows = n_rows;
        st.capture_stream = stream_mode;
        st.generation++;
        if (n > 0) { // taking captures away needs no memory
            try {
                st.want_all();
                llama_steer_access::reserve(st.ctx);
                st.stats.n_reserves++;
            } catch (...) {
                std::swap(st.captures, captures);
                st.capture_rows = old_rows;
                st.capture_stream = old_stream;
                st.generation++;
                llama_steer_access::reserve_again(st.ctx);
                throw steer_error(LLAMA_STEER_ERR_MEMORY, "not enough memory to compute with these captures: read fewer layers, or use a smaller n_ubatch");
            }
        }
        st.capture_keep = keep;
        st.kept_at.clear();
    });
}

int32_t llama_steer_capture_range(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, bool wanted) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (seq < 0 || p0 < 0 || (p1 >= 0 && p1 <= p0)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("sequence %d, positions %d to %d is no range", seq, p0, p1));
        }
        st.wanted[seq].set(p0, p1, wanted);
    });
}

int32_t llama_steer_capture_count(const llama_context * ctx) {
    const auto * st = state_of(ctx);
    return st ? (int32_t) st->kept_at.size() : 0;
}

int32_t llama_steer_capture_index(const llama_context * ctx, llama_seq_id * seq, llama_pos * pos) {
    return guarded(const_cast<llama_context *>(ctx), [&]() {
        const auto * st = state_of(ctx);
        if (!st || !seq || !pos) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "nothing has been read in this context, or a result is NULL");
        }
        for (size_t i = 0; i < st->kept_at.size(); ++i) {
            seq[i] = st->kept_at[i].first;
            pos[i] = st->kept_at[i].second;
        }
    });
}

int32_t llama_steer_capture_get(const llama_context * ctx, int32_t il, int32_t site, float * out, size_t n_floats) {
    return guarded(const_cast<llama_context *>(ctx), [&]() {
        const auto * st = state_of(ctx);
        if (!out) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the result is NULL");
        }
        if (st) {
            for (const auto & tp : st->captures) {
                if (tp.at == place(il, site)) {
                    if (n_floats != tp.kept.size()) { // fewer streams, or more, than were read
                        throw steer_error(LLAMA_STEER_ERR_ARG, format("%zu floats were read at layer %d, there is room for %zu", tp.kept.size(), il, n_floats));
                    }
                    std::copy(tp.kept.begin(), tp.kept.end(), out);
                    return;
                }
            }
        }
        throw steer_error(LLAMA_STEER_ERR_ARG, format("layer %d, %s is not captured", il, site_name(site)));
    });
}

int32_t llama_steer_capture_clear(llama_context * ctx) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        st.not_in_callback("dropping the rows");
        drop_kept(st);
    });
}

int32_t llama_steer_set_read_callback(llama_context * ctx, llama_steer_read_callback callback, void * user_data) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        st.not_in_callback("changing a callback");
        st.read_cb = callback;
        st.read_cb_data = user_data;
    });
}

int32_t llama_steer_set_add_callback(llama_context * ctx, llama_steer_add_callback callback, void * user_data) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        st.not_in_callback("changing a callback");
        st.add_cb = callback;
        st.add_cb_data = user_data;
    });
}

int32_t llama_steer_get_stats(const llama_context * ctx, llama_steer_stats * out) {
    return guarded(const_cast<llama_context *>(ctx), [&]() {
        if (!ctx || !out) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the context or the result is NULL");
        }
        *out = {};
        if (const auto * st = state_of(ctx)) {
            *out = st->stats;
            out->n_rows_capacity = st->n_rows;
            for (const auto & g : st->groups) {
                out->n_device_bytes += g.buf ? ggml_backend_buffer_get_size(g.buf.get()) : 0;
                out->n_device_bytes += g.buf_dyn ? ggml_backend_buffer_get_size(g.buf_dyn.get()) : 0;
            }
            for (const auto & tp : st->captures) {
                out->n_device_bytes += ggml_backend_buffer_get_size(tp.buf.get());
            }
        }
    });
}

int64_t llama_steer_fired(const llama_context * ctx, int32_t il, int32_t site) {
    const auto * st = state_of(ctx);
    if (!st) {
        return 0;
    }
    auto it = st->fired.find(place(il, site));
    return it == st->fired.end() ? 0 : it->second;
}

int32_t llama_steer_seq_error(llama_context * ctx, llama_seq_id seq) {
    auto * st = state_of(ctx);
    if (!st) {
        return LLAMA_STEER_OK;
    }
    auto it = seq < 0 ? st->seq_errors.begin() : st->seq_errors.find(seq);
    if (it == st->seq_errors.end()) {
        return LLAMA_STEER_OK;
    }
    const int32_t code = it->second.first;
    set_error(ctx, it->second.second);
    st->seq_errors.erase(it);
    return code;
}

int64_t llama_steer_config_fired(const llama_context * ctx, int32_t config_id, int32_t il, int32_t site) {
    const auto * st = state_of(ctx);
    if (!st || !st->configs.count(config_id)) {
        return 0;
    }
    const auto & fired = st->configs.at(config_id).fired;
    auto it = fired.find(place(il, site));
    return it == fired.end() ? 0 : it->second;
}

int32_t llama_steer_free(llama_context * ctx) {
    return guarded(ctx, [&]() {
        if (!ctx) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the context is NULL");
        }
        if (const auto * st = state_of(ctx)) {
            st->not_in_callback("freeing the steering");
        }
        ctx->synchronize();
        llama_steer_access::cvec(*ctx).state.reset();
        llama_steer_access::reserve_later(*ctx);
    });
}
