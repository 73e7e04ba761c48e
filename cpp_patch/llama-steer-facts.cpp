// llama-steer-facts.cpp - what is known of an architecture. That it was tested is listed; the rest is found out from a graph.

#include "llama-graph.h"
#include "llama-steer-state.h"

#include "ggml-cpp.h"
#include "llama-cpp.h"

namespace llama_steer {

// By name, so that a tree need not know all of them. A further one: a generator in steer_plugins.testing, a line here, and the tests.
static const char * const TESTED[] = {
    "afmoe",
    "apertus",
    "arcee",
    "arctic",
    "arwkv7",
    "baichuan",
    "bailingmoe",
    "bailingmoe2",
    "bailingmoe3",
    "bitnet",
    "bloom",
    "chatglm",
    "codeshell",
    "cogvlm",
    "cohere2",
    "cohere2moe",
    "command-r",
    "dbrx",
    "deci",
    "deepseek",
    "deepseek2",
    "deepseek32",
    "deepseek4",
    "dots1",
    "dots3note",
    "dream",
    "ernie4_5",
    "ernie4_5-moe",
    "exaone",
    "exaone-moe",
    "exaone4",
    "falcon",
    "falcon-h1",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma4",
    "glm-dsa",
    "glm4",
    "glm4moe",
    "glm5-next",
    "gpt-oss",
    "gpt2",
    "gptneox",
    "granite",
    "granite_swa",
    "granitehybrid",
    "granitemoe",
    "grok",
    "grovemoe",
    "hrm_text",
    "hunyuan-dense",
    "hunyuan-moe",
    "hunyuan_vl",
    "hy_v3",
    "internlm2",
    "jais",
    "jais2",
    "jamba",
    "kimi-k3",
    "laguna",
    "lfm2",
    "lfm2moe",
    "llada",
    "llada-moe",
    "llama",
    "llama4",
    "maincoder",
    "mamba",
    "mamba2",
    "maple",
    "mellum",
    "mimo2",
    "minicpm",
    "minicpm3",
    "minimax-m2",
    "minimax-m3",
    "mistral3",
    "mistral4",
    "muse-glimmer",
    "nanbeige",
    "nemotron",
    "olmo",
    "olmo2",
    "olmoe",
    "openelm",
    "orion",
    "paddleocr",
    "pangu-embedded",
    "phi2",
    "phi3",
    "phimoe",
    "plamo",
    "plamo3",
    "pockettts",
    "qwen",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen35",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen3vl",
    "qwen3vlmoe",
    "refact",
    "rnd1",
    "rwkv6",
    "rwkv7",
    "seed_oss",
    "smallthinker",
    "smollm3",
    "spark2_5",
    "stablelm",
    "starcoder",
    "starcoder2",
    "step35",
    "talkie",
    "xverse",
};

bool is_tested(llm_arch arch) {
    const std::string name = llm_arch_name(arch);
    return std::any_of(std::begin(TESTED), std::end(TESTED), [&](const char * other) { return name == other; });
}

// Numbers of tokens that no other extent of a hidden state is likely to have, so that the shape says which axis counts what.
constexpr uint32_t PROBE_TOKENS = 11; // or a few more
constexpr uint32_t PROBE_OUTPUTS = 3;

// A node that passed a hook of the graph that is built to find out.
void note_facts(llama_steer_state & st, const place & at, const ggml_tensor * cur, int64_t n_tokens, int64_t n_outputs) {
    const auto counts = [&](int64_t n) { return n == n_tokens || n == n_outputs; };
    auto & found = st.facts[at];
    found.n_seen++;
    if (cur->type != GGML_TYPE_F32 || cur->ne[0] != st.n_embd || cur->ne[3] != 1) {
        found.n_seen += 2; // of another shape: no hook of ours
    } else if (cur->ne[2] == 1 && counts(cur->ne[1])) {
        found.gathered = n_outputs != n_tokens && cur->ne[1] == n_outputs;
    } else if (at.second == LLAMA_STEER_RESID_POST && counts(cur->ne[2])) {
        found.n_streams = (int32_t) cur->ne[1];
        found.gathered = n_outputs != n_tokens && cur->ne[2] == n_outputs;
    } else {
        found.n_seen += 2;
    }
}

void find_facts(llama_steer_state & st) {
    st.probing = true;
    try {
        // where states are pooled every token is an output, and the graph cannot be built otherwise
        const bool pooled = st.ctx.get_cparams().embeddings && st.ctx.pooling_type() != LLAMA_POOLING_TYPE_NONE;
        llama_steer_access::build_once(st.ctx, PROBE_TOKENS, pooled ? UINT32_MAX : PROBE_OUTPUTS);
    } catch (...) {
        st.probing = false;
        throw;
    }
    st.probing = false;
    for (auto it = st.facts.begin(); it != st.facts.end();) {
        it = it->second.n_seen == 1 ? std::next(it) : st.facts.erase(it);
    }
    for (const auto & [at, found] : st.facts) {
        st.n_streams = std::max(st.n_streams, found.n_streams);
    }
    if (st.facts.empty()) {
        throw steer_error(LLAMA_STEER_ERR_ARCH, format("no hidden state of architecture '%s' passes a hook in this llama.cpp", llm_arch_name(st.model.arch)));
    }
}

static void tell(const llama_steer_state & st, llama_steer_info & out) {
    out.n_streams = st.n_streams;
    for (int32_t site = 0; site < LLAMA_STEER_SITE_COUNT; ++site) {
        out.sites[site] = st.site_ok(site);
    }
    auto last = st.facts.find(place(st.n_layer - 1, LLAMA_STEER_RESID_POST));
    out.last_layer_outputs_only = last != st.facts.end() && last->second.gathered;
}

// What holds for any model, tested or not. Throws when it cannot be steered.
static void begin_info(const llama_model * model, llama_steer_info * out) {
    if (!model || !out) {
        throw steer_error(LLAMA_STEER_ERR_ARG, "the model or the result is NULL");
    }
    *out = {};
    out->n_layer = compat::n_layer(model->hparams, 0);
    out->n_embd = (int32_t) model->hparams.n_embd;
    out->n_streams = 1;
    if (!is_tested(model->arch)) {
        throw steer_error(LLAMA_STEER_ERR_ARCH, format("architecture '%s' has not been tested with steering", llm_arch_name(model->arch)));
    }
}

} // namespace llama_steer

const char * llama_steer_arch_name(int32_t i) {
    const int32_t n = sizeof(TESTED) / sizeof(TESTED[0]);
    return i >= 0 && i < n ? TESTED[i] : nullptr;
}

int32_t llama_steer_context_info(llama_context * ctx, llama_steer_info * out) {
    return guarded(ctx, [&]() {
        begin_info(ctx ? &ctx->get_model() : nullptr, out);
        tell(state_for(ctx), *out);
    });
}

int32_t llama_steer_model_info(const llama_model * model, llama_steer_info * out) {
    return guarded(nullptr, [&]() {
        begin_info(model, out);
        // the facts are those of its graph, so a context is made for a moment, as small as can be
        auto params = llama_context_default_params();
        params.n_ctx = 256;
        params.n_batch = params.n_ubatch = PROBE_TOKENS;
        params.n_seq_max = 1;
        llama_context_ptr ctx{ llama_init_from_model(const_cast<llama_model *>(model), params) };
        if (!ctx) {
            throw steer_error(LLAMA_STEER_ERR_MEMORY, "not enough memory for a small context, in which to look at the model's graph");
        }
        tell(state_for(ctx.get()), *out);
    });
}
