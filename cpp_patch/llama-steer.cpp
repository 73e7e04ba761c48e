// llama-steer.cpp - the C API; see llama-steer.h for what it does and README.md for how it is hooked in.

#include "llama-steer-state.h"

llama_steer_cvec::llama_steer_cvec()  = default;
llama_steer_cvec::~llama_steer_cvec() = default;

std::shared_ptr<llama_adapter_cvec> llama_steer_make_cvec() {
    return std::make_shared<llama_steer_cvec>();
}

namespace llama_steer {

const arch_rule ARCH_RULES[] = {
    { LLM_ARCH_LLAMA,       false, true,  false },
    { LLM_ARCH_QWEN2,       false, true,  false },
    { LLM_ARCH_QWEN3,       false, true,  false },
    { LLM_ARCH_GEMMA3,      false, true,  false },
    { LLM_ARCH_DEEPSEEK2,   false, true,  false },
    { LLM_ARCH_DEEPSEEK4,   true,  false, true  },
    { LLM_ARCH_LLAMA4,      false, true,  false },
    { LLM_ARCH_MISTRAL3,    false, true,  false },
    { LLM_ARCH_MISTRAL4,    false, true,  false },
    { LLM_ARCH_QWEN2MOE,    false, true,  false },
    { LLM_ARCH_QWEN3MOE,    false, true,  false },
    { LLM_ARCH_QWEN3NEXT,   false, false, false },
    { LLM_ARCH_QWEN35,      false, false, false },
    { LLM_ARCH_QWEN35MOE,   false, false, false },
    { LLM_ARCH_GEMMA,       false, true,  false },
    { LLM_ARCH_GEMMA2,      false, true,  false },
    { LLM_ARCH_PHI3,        false, true,  false },
    { LLM_ARCH_GLM4,        false, true,  false },
    { LLM_ARCH_OPENAI_MOE,  false, false, false },
    { LLM_ARCH_GRANITE,     false, true,  false },
    { LLM_ARCH_GRANITE_MOE, false, true,  false },
    { LLM_ARCH_OLMO2,       false, true,  false },
    { LLM_ARCH_SMOLLM3,     false, true,  false },
    { LLM_ARCH_COMMAND_R,   false, true,  false },
    { LLM_ARCH_COHERE2,     false, true,  false },
    { LLM_ARCH_STARCODER2,  false, true,  false },
    { LLM_ARCH_EXAONE,      false, true,  false },
    { LLM_ARCH_EXAONE4,     false, true,  false },
    { LLM_ARCH_STABLELM,    false, true,  false },
};

const arch_rule * rule_for(llm_arch arch) {
    for (const auto & rule : ARCH_RULES) {
        if (rule.arch == arch) {
            return &rule;
        }
    }
    return nullptr;
}

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
        const auto * rule  = rule_for(model.arch);
        if (!rule) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, format("architecture '%s' has not been tested with steering", llm_arch_name(model.arch)));
        }
        if (ctx->get_cparams().ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, "a draft (MTP) context cannot be steered: steer the context of the main model");
        }
        if (model.hparams.no_alloc) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, "the model was loaded without its weights (no_alloc), so nothing can be steered");
        }
        cvec.state = std::make_unique<llama_steer_state>(*ctx, *rule);
        // graphs built so far do not know that they may have to give way to a steered one
        llama_steer_access::reserve_later(*ctx);
    }
    return *cvec.state;
}

void set_vector(llama_steer_state & st, int32_t vector_id, int32_t n, const int32_t * layers, const int32_t * sites,
        const float * dirs, const double * scales) {
    st.not_in_callback("changing a vector");
    if (vector_id < 0 || vector_id >= LLAMA_STEER_MAX_VECTORS) {
        throw steer_error(LLAMA_STEER_ERR_LIMIT, format("vector %d is out of range: 0 to %d", vector_id, LLAMA_STEER_MAX_VECTORS - 1));
    }
    if (n <= 0 || n > st.n_layer*LLAMA_STEER_SITE_COUNT || !layers || !sites || !dirs || !scales) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d needs 1 to %d directions with layers, sites and scales", vector_id, st.n_layer*LLAMA_STEER_SITE_COUNT));
    }
    steer_vector col;
    for (int32_t i = 0; i < n; ++i) {
        st.check_place(layers[i], sites[i]);
        if (!std::isfinite(scales[i])) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the scale of vector %d at layer %d is not finite", vector_id, layers[i]));
        }
        const float * v = dirs + (size_t) i*st.n_embd;
        double sq = 0.0;
        for (int32_t j = 0; j < st.n_embd; ++j) {
            sq += (double) v[j]*v[j];
        }
        if (!std::isfinite(sq)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the direction of vector %d at layer %d holds NaN or Inf", vector_id, layers[i]));
        }
        if (std::fabs(std::sqrt(sq) - 1.0) > 1e-3) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the direction of vector %d at layer %d has norm %g instead of 1", vector_id, layers[i], std::sqrt(sq)));
        }
        direction d;
        d.v.assign(v, v + st.n_embd);
        d.scale = scales[i];
        d.hash  = hash_bytes(v, st.n_embd*sizeof(float), 1);
        if (!col.dirs.emplace(place(layers[i], sites[i]), std::move(d)).second) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d has two directions at layer %d, %s", vector_id, layers[i], site_name(sites[i])));
        }
    }
    auto old = st.vectors.find(vector_id);
    if (old != st.vectors.end()) {
        col.dyn = old->second.dyn;
        for (const auto & [_, c] : st.configs) {
            for (const auto & t : c.terms) {
                if (t.vector == vector_id && std::none_of(col.dirs.begin(), col.dirs.end(), [&](const auto & d) { return term_covers(t, d.first, -1); })) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is used by a config whose layer window holds none of its new layers", vector_id));
                }
            }
        }
        auto vectors = st.vectors;
        vectors[vector_id] = col;
        for (const auto & [_, c] : st.configs) {
            check_finite(vectors, c.terms);
        }
    }

    auto places = places_of(st);
    bool grown = false;
    for (const auto & [at, _] : col.dirs) {
        if (!st.slot_of.count(at)) {
            places.push_back(at);
            grown = true;
        }
    }
    if (grown) {
        std::sort(places.begin(), places.end());
        auto vectors = st.vectors;
        vectors[vector_id] = col;
        rebuild_bank(st, places, st.n_dyn, st.dyn_cols, vectors);
    } else {
        st.ctx.synchronize();
        if (col.dyn >= 0) {
            upload_dyn(st, st.groups, st.slots, st.n_dyn, col.dyn, &col);
        }
        drop_rows(st);
    }
    st.vectors[vector_id] = std::move(col);
    refresh_ids(st);
}

void clear_vector(llama_steer_state & st, int32_t vector_id) {
    st.not_in_callback("clearing a vector");
    auto it = st.vectors.find(vector_id);
    if (it == st.vectors.end()) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is not set", vector_id));
    }
    if (in_use(st, vector_id)) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is in use by a config", vector_id));
    }
    st.ctx.synchronize();
    if (it->second.dyn >= 0) {
        upload_dyn(st, st.groups, st.slots, st.n_dyn, it->second.dyn, nullptr);
        st.dyn_cols[it->second.dyn] = -1;
    }
    drop_rows(st);
    st.vectors.erase(it);
}

void set_config(llama_steer_state & st, int32_t config_id, int32_t n_terms, const llama_steer_term * terms) {
    if (config_id < 1) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("config %d cannot be set: ids start at 1, 0 is no steering", config_id));
    }
    if (n_terms < 0 || n_terms > LLAMA_STEER_MAX_TERMS || (n_terms > 0 && !terms)) {
        throw steer_error(LLAMA_STEER_ERR_LIMIT, format("a config takes 0 to %d terms, not %d", LLAMA_STEER_MAX_TERMS, n_terms));
    }
    std::vector<int32_t> promote; // vectors that now need V on the device
    const auto is_dyn = [](const llama_steer_term & t) { return t.op == LLAMA_STEER_PROJECT || t.op == LLAMA_STEER_CLAMP; };
    for (int32_t i = 0; i < n_terms; ++i) {
        const auto & t = terms[i];
        auto it = st.vectors.find(t.vector);
        if (it == st.vectors.end()) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is not set", t.vector));
        }
        if (t.op < LLAMA_STEER_ADD || t.op > LLAMA_STEER_RENORM) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("op %d does not exist", t.op));
        }
        if (!std::isfinite(t.strength)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the strength of vector %d is not finite", t.vector));
        }
        if (t.il_first >= 0 && t.il_last >= 0 && t.il_first > t.il_last) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the layer window %d-%d is empty", t.il_first, t.il_last));
        }
        if (t.stream < LLAMA_STEER_STREAM_ALL || t.stream >= st.n_streams) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("stream %d does not exist: this model has %d", t.stream, st.n_streams));
        }
        bool covers = false;
        for (const auto & [at, d] : it->second.dirs) {
            const bool here = term_covers(t, at, -1);
            covers = covers || here;
            if (here && t.stream >= 0 && at.second != LLAMA_STEER_RESID_POST) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("a stream cannot be named at %s", site_name(at.second)));
            }
        }
        if (!covers) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the layer window %d-%d holds none of the layers of vector %d", t.il_first, t.il_last, t.vector));
        }
        if (is_dyn(t) && it->second.dyn < 0 && std::find(promote.begin(), promote.end(), t.vector) == promote.end()) {
            promote.push_back(t.vector);
        }
    }

    const std::vector<llama_steer_term> wanted(terms, terms + n_terms);
    check_finite(st.vectors, wanted);
    check_renorm(st.vectors, wanted);

    const bool renorms = std::any_of(wanted.begin(), wanted.end(), [](const llama_steer_term & t) { return t.op == LLAMA_STEER_RENORM; });
    if (renorms && !st.norms) {
        st.not_in_callback("the first renorm");
        st.norms = true;
        try {
            rebuild_bank(st, places_of(st), st.n_dyn, st.dyn_cols, st.vectors);
        } catch (...) {
            st.norms = false;
            llama_steer_access::reserve_later(st.ctx);
            throw;
        }
    }

    if (!promote.empty()) {
        st.not_in_callback("a vector's first project or clamp");
        auto dyn_cols = st.dyn_cols;
        auto vectors  = st.vectors;
        for (int32_t k : promote) {
            auto free = std::find(dyn_cols.begin(), dyn_cols.end(), -1);
            if (free == dyn_cols.end()) {
                // take the place of a vector that projects no longer
                for (auto it = dyn_cols.begin(); it != dyn_cols.end() && free == dyn_cols.end(); ++it) {
                    bool used = std::find(promote.begin(), promote.end(), *it) != promote.end();
                    for (const auto & [id, c] : st.configs) {
                        for (const auto & t : c.terms) {
                            used = used || (id != config_id && t.vector == *it && is_dyn(t));
                        }
                    }
                    for (int32_t i = 0; i < n_terms; ++i) {
                        used = used || (terms[i].vector == *it && is_dyn(terms[i]));
                    }
                    if (!used && (int32_t) dyn_cols.size() >= LLAMA_STEER_MAX_DYN) {
                        vectors.at(*it).dyn = -1;
                        free = it;
                    }
                }
            }
            if (free == dyn_cols.end()) {
                if ((int32_t) dyn_cols.size() >= LLAMA_STEER_MAX_DYN) {
                    throw steer_error(LLAMA_STEER_ERR_LIMIT, format("more than %d vectors project or clamp at once", LLAMA_STEER_MAX_DYN));
                }
                dyn_cols.push_back(-1);
                free = dyn_cols.end() - 1;
            }
            *free = k;
            vectors.at(k).dyn = (int32_t) (free - dyn_cols.begin());
        }
        int32_t n_dyn = std::max(st.n_dyn, 4);
        while (n_dyn < (int32_t) dyn_cols.size()) {
            n_dyn *= 2;
        }
        if (n_dyn != st.n_dyn) {
            rebuild_bank(st, places_of(st), n_dyn, dyn_cols, vectors);
        } else {
            st.ctx.synchronize();
            for (int32_t k : promote) {
                upload_dyn(st, st.groups, st.slots, st.n_dyn, vectors.at(k).dyn, &vectors.at(k));
            }
            drop_rows(st);
        }
        st.dyn_cols = std::move(dyn_cols);
        st.vectors  = std::move(vectors);
    }

    auto & c = st.configs[config_id];
    c.terms = wanted;
    set_acting(st, c);
    forget_rows_of(st, config_id);
}

void clear_config(llama_steer_state & st, int32_t config_id) {
    if (!st.configs.erase(config_id)) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("config %d is not set", config_id));
    }
    forget_rows_of(st, config_id);
    for (auto & [_, r] : st.ranges) {
        for (auto & [p, id] : r.starts) {
            id = id == config_id ? 0 : id;
        }
    }
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

const char * llama_steer_arch_name(int32_t i) {
    const int32_t n = sizeof(ARCH_RULES)/sizeof(ARCH_RULES[0]);
    return i >= 0 && i < n ? llm_arch_name(ARCH_RULES[i].arch) : nullptr;
}

int32_t llama_steer_model_info(const llama_model * model, llama_steer_info * out) {
    return guarded(nullptr, [&]() {
        if (!model || !out) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the model or the result is NULL");
        }
        *out = {};
        out->n_layer   = (int32_t) model->hparams.n_layer();
        out->n_embd    = (int32_t) model->hparams.n_embd;
        out->n_streams = 1;
        const auto * rule = rule_for(model->arch);
        if (!rule) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, format("architecture '%s' has not been tested with steering", llm_arch_name(model->arch)));
        }
        out->n_streams = rule->streams ? (int32_t) model->hparams.dsv4_hc_mult : 1;
        out->sites[LLAMA_STEER_RESID_POST] = true;
        out->sites[LLAMA_STEER_ATTN_OUT]   = rule->writer_sites;
        out->sites[LLAMA_STEER_FFN_OUT]    = rule->writer_sites;
        out->last_layer_outputs_only       = rule->last_layer_outputs;
    });
}

int32_t llama_steer_vector_set(llama_context * ctx, int32_t vector_id, int32_t n, const int32_t * layers, const int32_t * sites, const float * dirs, const double * scales) {
    return guarded(ctx, [&]() { set_vector(state_for(ctx), vector_id, n, layers, sites, dirs, scales); });
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
        st.ranges[seq].set(p0, p1, config_id);
    });
}

int32_t llama_steer_seq_clear(llama_context * ctx, llama_seq_id seq) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (seq < 0) {
            st.ranges.clear();
            st.wanted.clear();
            st.seq_errors.clear();
        } else {
            st.ranges.erase(seq);
            st.wanted.erase(seq);
            st.seq_errors.erase(seq);
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
        if (n < 0 || n > st.n_layer*LLAMA_STEER_SITE_COUNT || (n > 0 && (!layers || !sites))) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("0 to %d captures can be set, not %d", st.n_layer*LLAMA_STEER_SITE_COUNT, n));
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
            tp.at        = place(layers[i], sites[i]);
            tp.n_streams = st.streams_at(sites[i]);
            tp.n_out     = stream_mode == LLAMA_STEER_STREAM_ALL ? tp.n_streams : 1;
            tp.last      = st.is_last(tp.at);
            for (const auto & other : captures) {
                if (other.at == tp.at) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("layer %d, %s is captured twice", layers[i], site_name(sites[i])));
                }
            }
            tp.ctx  = new_tensor_context(1);
            tp.rows = ggml_new_tensor_2d(tp.ctx.get(), GGML_TYPE_F32, st.n_embd, (int64_t) (n_rows + 1)*tp.n_out);
            ggml_set_name(tp.rows, "steer_capture");
            tp.buf  = allocate(tp.ctx.get(), st.model.select_buft(layers[i]), false, "rows to read");
            captures.push_back(std::move(tp));
        }

        st.ctx.synchronize();
        std::swap(st.captures, captures);
        const auto old_rows   = st.capture_rows;
        const auto old_stream = st.capture_stream;
        st.capture_rows   = n_rows;
        st.capture_stream = stream_mode;
        st.generation++;
        if (n > 0) { // taking captures away needs no memory
            try {
                st.mode = MODE_ALL;
                llama_steer_access::reserve(st.ctx);
                st.stats.n_reserves++;
            } catch (...) {
                std::swap(st.captures, captures);
                st.capture_rows   = old_rows;
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
        st.read_cb      = callback;
        st.read_cb_data = user_data;
    });
}

int32_t llama_steer_set_add_callback(llama_context * ctx, llama_steer_add_callback callback, void * user_data) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        st.not_in_callback("changing a callback");
        st.add_cb      = callback;
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
                out->n_device_bytes += g.buf     ? ggml_backend_buffer_get_size(g.buf.get())     : 0;
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
