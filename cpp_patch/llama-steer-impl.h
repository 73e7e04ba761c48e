// llama-steer-impl.h - the few calls that the hooks add to llama.cpp's own files. Nothing else includes this.
#pragma once

#include "llama-adapter.h"
#include "llama-steer.h"

struct ggml_tensor;
struct llama_context;
struct llama_ubatch;
struct llm_graph_context;
struct llama_steer_state;

// The per-context control vector object, with the steering state hung on it: graph parameters carry a pointer to it already,
// so no other structure of llama.cpp has to know about steering.
struct llama_steer_cvec : public llama_adapter_cvec {
    llama_steer_cvec();
    ~llama_steer_cvec();

    std::unique_ptr<llama_steer_state> state; // null until the first llama_steer call: then the stock code runs
};

std::shared_ptr<llama_adapter_cvec> llama_steer_make_cvec();

// Adds the edit and the capture of (il, site) to the graph that is being built; returns cur itself when there are none.
ggml_tensor * llama_steer_build(const llm_graph_context & graph, ggml_tensor * cur, int il, llama_steer_site site);

// One ubatch: decides which graph is wanted and fills the coefficients (constructor), collects what was read (finish).
struct llama_steer_ubatch {
    llama_steer_ubatch(llama_context & ctx, const llama_ubatch & ubatch, uint32_t n_outputs);
    ~llama_steer_ubatch();

    bool finish(); // after the compute; false: a callback refused, or reading failed

    llama_steer_state * state = nullptr;
    llama_context & ctx;
    bool ok = true;
};

uint32_t llama_steer_max_nodes(const llama_adapter_cvec & cvec);
