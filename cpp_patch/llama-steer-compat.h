// llama-steer-compat.h - what differs between versions of llama.cpp: found out by the compiler, nowhere by number.
#pragma once

#include "llama.h"

#include <cstdint>

namespace llama_steer {

// Each is called with 0: an int goes to the first whose names exist here, and only then to the one with long.
namespace compat {

template <typename H>
auto n_layer(const H & hparams, int) -> decltype((int32_t) hparams.n_layer()) {
    return (int32_t) hparams.n_layer();
}
template <typename H>
auto n_layer(const H & hparams, long) -> decltype((int32_t) hparams.n_layer) {
    return (int32_t) hparams.n_layer;
}

// Products are summed in float32: some back ends would round to TF32.
template <typename T>
auto exact(T * product, int) -> decltype((void) ggml_prec_set_acc(product, GGML_PREC_F32)) {
    ggml_prec_set_acc(product, GGML_PREC_F32);
}
template <typename T>
auto exact(T * product, long) -> decltype((void) ggml_mul_mat_set_prec(product, GGML_PREC_F32)) {
    ggml_mul_mat_set_prec(product, GGML_PREC_F32);
}

template <typename C>
auto is_main(const C & cparams, int) -> decltype((bool) (cparams.ctx_type == cparams.ctx_type)) {
    return (int) cparams.ctx_type == 0; // LLAMA_CONTEXT_TYPE_DEFAULT
}
template <typename C>
bool is_main(const C &, long) {
    return true;
}

template <typename H>
auto no_alloc(const H & hparams, int) -> decltype((bool) hparams.no_alloc) {
    return hparams.no_alloc;
}
template <typename H>
bool no_alloc(const H &, long) {
    return false;
}

} // namespace compat

} // namespace llama_steer
