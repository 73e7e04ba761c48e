// llama-steer-stock.h - steering beside an unmodified llama.cpp, through what its public API offers.
//
// The whole of llama-steer.h works here too, on contexts that llama_steer_stock_new() makes: each stands for one context of the real
// library. What the patch puts into the compute graph is done by an evaluation callback instead, which gets the outputs of layers, edits
// them in place and sends them back; what all tokens of a batch have added alike goes through the library's own control vector, where
// that can be seen to act. Nothing here is linked with llama.cpp or ggml: their calls are handed over as pointers, so that any build of any
// version will do whose structures are as they are checked to be.
//
//   model    llama_steer_stock_look() is the cb_eval of a small context that decodes one batch of n_tokens, of which n_outputs are
//            outputs: from the nodes that pass, and their shapes, it is known what can be steered
//   context  llama_steer_stock_eval() is its cb_eval; llama_steer_stock_begin() and _end() stand around each llama_decode(), whose
//            batch has to be computed as it is, in one piece and in its order (one ubatch)
#ifndef LLAMA_STEER_STOCK_H
#define LLAMA_STEER_STOCK_H

#include "../llama-steer.h"

#ifdef __cplusplus
extern "C" {
#endif

    // Calls of the library that computes.
    struct llama_steer_stock_calls {
        const char * (*get_name)(const void * tensor);
        size_t (*nbytes)(const void * tensor);
        void * (*get_data)(const void * tensor);
        bool (*is_contiguous)(const void * tensor);
        void (*tensor_get)(const void * tensor, void * data, size_t offset, size_t size);
        void (*tensor_set)(void * tensor, const void * data, size_t offset, size_t size);
        void (*synchronize)(void * ctx);
        int32_t (*set_cvec)(void * ctx, const float * data, size_t len, int32_t n_embd, int32_t il_start, int32_t il_end); // may be NULL
    };

    struct llama_steer_stock_stats {
        uint64_t n_batches;  // that were steered or read
        uint64_t n_cvec;     // of these, the ones that the control vector steered
        uint64_t n_edits;    // outputs of layers that were edited by the callback
        uint64_t n_cvec_set; // times the library was told a control vector
    };

    // NULL on an error: llama_steer_error(NULL) tells it.
    LLAMA_API struct llama_model * llama_steer_stock_model_new(
        const struct llama_steer_stock_calls * calls, const char * arch, int32_t n_layer, int32_t n_embd, int32_t n_tokens, int32_t n_outputs);
    LLAMA_API void llama_steer_stock_model_free(struct llama_model * model);
    LLAMA_API bool llama_steer_stock_look(void * tensor, bool ask, void * model);

    // Then the library's control vector is told something to be seen by, and the context has to decode another batch, before it is given up:
    // it is used later only if the outputs of all layers but 0 were seen to be made with it.
    LLAMA_API void llama_steer_stock_mark(struct llama_model * model, void * real);

    // n_batch: most tokens of a batch. one_sequence: the library parts batches by sequence, so that each must be of one.
    // `real` is told later, as its callback has to be there before it.
    LLAMA_API struct llama_context * llama_steer_stock_new(struct llama_model * model, int32_t n_batch, int32_t n_seq_max, bool one_sequence);
    LLAMA_API void llama_steer_stock_bind(struct llama_context * ctx, void * real);
    LLAMA_API void llama_steer_stock_free(struct llama_context * ctx);
    LLAMA_API bool llama_steer_stock_eval(void * tensor, bool ask, void * ctx);

    // Before llama_decode() of a batch, with its own arrays. Not 0: it must not be computed, llama_steer_error() tells why.
    LLAMA_API int32_t llama_steer_stock_begin(
        struct llama_context * ctx, int32_t n_tokens, const llama_pos * pos, const int32_t * n_seq_id, llama_seq_id * const * seq_id, const int8_t * output);

    // After it. computed: it returned 0. Not 0: as if llama_decode() had failed.
    LLAMA_API int32_t llama_steer_stock_end(struct llama_context * ctx, bool computed);

    LLAMA_API void llama_steer_stock_get_stats(const struct llama_context * ctx, struct llama_steer_stock_stats * out);

#ifdef __cplusplus
}
#endif

#endif // LLAMA_STEER_STOCK_H
