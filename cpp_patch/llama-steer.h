// llama-steer.h - activation steering for llama.cpp: read and edit the hidden state of each token.
//
// At a steered layer and site the hidden state h (n_embd floats) of a token becomes
//
//     h  <-  h + V (c + g o phi(W^T h + b))          V, W: n_embd x K unit rows; c, g, b: K numbers per token
//
// phi(z) is z, or z above a knee and 0 elsewhere. "add" is c = strength * scale. For a plain direction v, which is read and written,
// "project" is g = -strength, "clamp" is c = strength * scale and g = -1; "floor" adds strength * relu(level * scale - v.h) along v, "cap"
// takes strength * relu(v.h - level * scale) away (with a scale below 0 the two change places). A direction may have columns instead, each
// with its own w, b, knee, v and gain: "add" then has g = strength * gain beside its c, and "project" and "clamp" use strength * gain and
// gain in place of the g above. "renorm" adds as "add" does and then gives h the length it had: h <- h' |h| / |h'|. Several of these are
// added together first; at one place and stream they cannot be combined with another op.
// All of it reads the state before the edit. Of several streams each reads and writes its own state.
// Strength, layer window and stream are turned into c and g here and nowhere else, so that every engine agrees.
//
//   vector  a steering vector: a set of unit directions over (layer, site), each with its scale
//   config  a set of terms (vector, op, strength, layer window, stream); config 0 is "no steering"
//   range   which config the tokens of a sequence get, by position
//   capture     a (layer, site) whose hidden states are copied out for chosen tokens, after the edit
//
// Everything belongs to one llama_context and is freed with it. Calls are not thread safe against llama_decode() on the
// same context; between two llama_decode() calls anything may be changed. No call throws, aborts or exits on bad input:
// it returns a negative llama_steer_status, changes nothing, and llama_steer_error() tells why in one sentence.
#ifndef LLAMA_STEER_H
#define LLAMA_STEER_H

#include "llama.h"
#include "llama-steer-plan.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LLAMA_STEER_API_VERSION 4

#ifdef __cplusplus
extern "C" {
#endif

    enum llama_steer_status {
        LLAMA_STEER_OK = 0,
        LLAMA_STEER_ERR_ARG = -1,    // an argument is out of range, not finite, or unknown
        LLAMA_STEER_ERR_ARCH = -2,   // the architecture, context type or site cannot be steered
        LLAMA_STEER_ERR_MEMORY = -3, // buffers could not be allocated; the former state is back in force
        LLAMA_STEER_ERR_LIMIT = -4,  // more vectors, rows or layers than the documented limits
        LLAMA_STEER_ERR_INTERNAL = -5,
    };

    enum llama_steer_site {
        LLAMA_STEER_RESID_POST = 0, // the block's output
        LLAMA_STEER_ATTN_OUT = 1,   // attention output, before it is written to the residual stream (deepseek4)
        LLAMA_STEER_FFN_OUT = 2,    // feed-forward output (routed + shared), before it is written (deepseek4)
        LLAMA_STEER_SITE_COUNT = 3,
    };

    enum llama_steer_stream {
        LLAMA_STEER_STREAM_ALL = -1,  // terms: write to every stream; captures: read every stream
        LLAMA_STEER_STREAM_MEAN = -2, // captures only: the mean over the streams
    };

#define LLAMA_STEER_MAX_VECTORS 4096 // vectors held at once
#define LLAMA_STEER_MAX_DYN     64   // rows of them that read the state: directions that project or clamp, floors, caps, columns

    struct llama_steer_info {
        int32_t n_layer; // steerable layers, 0-based; MTP blocks do not count
        int32_t n_embd;
        int32_t n_streams; // hyper-connection streams of resid_post; 1 in most architectures
        bool sites[LLAMA_STEER_SITE_COUNT];
        bool last_layer_outputs_only; // the last layer holds output tokens only: it cannot be read elsewhere
    };

    struct llama_steer_term {
        int32_t vector;
        int32_t op;       // enum llama_steer_op
        double strength;  // finite; 0 = not applied
        int32_t il_first; // inclusive window, -1 = open end
        int32_t il_last;
        int32_t stream; // LLAMA_STEER_STREAM_ALL or a stream index (resid_post only)
        double level;   // of floor and cap, in units of the scale
    };

    struct llama_steer_stats {
        uint64_t n_ubatches;      // computed with this library since the first llama_steer call on the context
        uint64_t n_graph_builds;  // graphs built, reserve passes excluded
        uint64_t n_graph_on;      // of these, graphs that carry edits or captures
        uint64_t n_edit_nodes;    // nodes of the edits in the graph that was built last
        uint64_t n_reserves;      // times the compute buffers were reserved again for steering
        uint64_t n_row_uploads;   // combined directions written to the device
        uint64_t n_row_waits;     // ubatches that waited for the device before they could write some
        uint64_t n_rows_capacity; // distinct (config, callback) combinations the device holds
        uint64_t n_device_bytes;  // device memory held by directions and captures, without compute buffers
    };

    // "llama-steer <api version>"
    LLAMA_API const char * llama_steer_version(void);

    // Why the last failing call on this context failed (also a llama_decode() that returned -3). Never NULL.
    LLAMA_API const char * llama_steer_error(const struct llama_context * ctx);

    // What can be steered, found out from the model's graph; of a model alone by way of a small context that is made for it.
    // LLAMA_STEER_ERR_ARCH: the architecture is not in the tested list (out is still filled, sites all false).
    LLAMA_API int32_t llama_steer_context_info(struct llama_context * ctx, struct llama_steer_info * out);
    LLAMA_API int32_t llama_steer_model_info(const struct llama_model * model, struct llama_steer_info * out);

    // Name of an architecture in the tested list, NULL past the end.
    LLAMA_API const char * llama_steer_arch_name(int32_t i);

    // ---- vectors ----

    // Set (or replace) a vector: n directions. layers[i], sites[i]: where; dirs: [n][n_embd], unit norm within 1e-3;
    // scales[i]: the dose, in units of the hidden state, that strength 1 means there.
    // The first vector that names a layer makes the context reserve its compute buffers again.
    LLAMA_API int32_t llama_steer_vector_set(
        struct llama_context * ctx,
        int32_t vector,
        int32_t n,
        const int32_t * layers,
        const int32_t * sites,
        const float * dirs,
        const double * scales);

    // The same for a vector that may have columns; its key is not looked at. While a config uses it,
    // its columns cannot become more than they are.
    LLAMA_API int32_t llama_steer_vector_put(struct llama_context * ctx, int32_t vector, const struct llama_steer_vector * content);

    // Forget a vector. Refused (ERR_ARG) while a config uses it.
    LLAMA_API int32_t llama_steer_vector_clear(struct llama_context * ctx, int32_t vector);

    // ---- configs and ranges ----

    // Set (or replace) config >= 1. Replacing one changes every later token of the ranges that point to it.
    // n_terms = 0 makes it a config that applies nothing. A window that holds none of the vector's layers is an error, and so
    // are a renorm at a place and stream where another op acts, and two floors or two caps of one vector there, at different levels. The first renorm makes the context reserve its compute buffers again.
    LLAMA_API int32_t llama_steer_config_set(struct llama_context * ctx, int32_t config, int32_t n_terms, const struct llama_steer_term * terms);
    LLAMA_API int32_t llama_steer_config_clear(struct llama_context * ctx, int32_t config); // its ranges fall back to config 0

    // Tokens of sequence seq at positions p0 <= p < p1 (p1 < 0: no end) get config; later calls win over earlier ones.
    // Ranges persist over llama_decode() calls, retries and replays.
    LLAMA_API int32_t llama_steer_range(struct llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, int32_t config);

    // Drop the ranges (steering and captures) of a sequence, or of all with seq < 0.
    LLAMA_API int32_t llama_steer_seq_clear(struct llama_context * ctx, llama_seq_id seq);

    // Content hash of what a token at (seq, pos) would get from its range (callbacks aside); 0 = nothing.
    // Cached tokens may be shared between requests only where (token, edit id) agree.
    LLAMA_API uint64_t llama_steer_edit_id(const struct llama_context * ctx, llama_seq_id seq, llama_pos pos);
    LLAMA_API uint64_t llama_steer_config_id(const struct llama_context * ctx, int32_t config);

    // Does the config apply anything at (il, site)? False where its terms cancel out.
    LLAMA_API bool llama_steer_config_acts(const struct llama_context * ctx, int32_t config, int32_t il, int32_t site);

    // ---- plans: what the engines use; vectors and configs are found by content, and made, shared and given up behind them ----

    // What tokens at pos[i] get under a plan, as edit ids, without making anything for it but room for its vectors: a request is looked
    // at so before it is known where it runs.
    LLAMA_API int32_t llama_steer_plan_edits(struct llama_context * ctx, const struct llama_steer_plan * plan, int32_t n, const llama_pos * pos, uint64_t * out);

    // Tokens of seq at positions >= from get what the plan says. All it needs is made first, so that an error belongs to this call
    // and changes nothing. What the sequence holds is given up with llama_steer_seq_clear().
    LLAMA_API int32_t llama_steer_plan_apply(struct llama_context * ctx, const struct llama_steer_plan * plan, llama_seq_id seq, llama_pos from);

    // The id of a vector in this context, for an add callback; it stays until it is unpinned as often. op: what the callback will do
    // with it; LLAMA_STEER_PROJECT or _CLAMP make it ready for g.
    LLAMA_API int32_t llama_steer_vector_pin(struct llama_context * ctx, const struct llama_steer_vector * vector, int32_t op, int32_t * id);
    LLAMA_API int32_t llama_steer_vector_unpin(struct llama_context * ctx, int32_t id);

    // What went wrong with a sequence (seq < 0: with any) while tokens of others were computed as they should: it was not steered as
    // its ranges say, a layer that its config names was never passed through, or a wanted token could not be read. LLAMA_STEER_OK:
    // nothing. Told once; llama_steer_error() then has the sentence. To be asked after each llama_decode().
    LLAMA_API int32_t llama_steer_seq_error(struct llama_context * ctx, llama_seq_id seq);

    // ---- captures ----

    // Replace the set of captures. stream_mode: LLAMA_STEER_STREAM_MEAN or _ALL (resid_post). n_rows: most tokens wanted from one
    // ubatch (0: as many as can come). keep: hold the rows for llama_steer_capture_get(); false when only the read callback wants them.
    // n = 0 takes all captures away.
    LLAMA_API int32_t llama_steer_capture_set(
        struct llama_context * ctx,
        int32_t n,
        const int32_t * layers,
        const int32_t * sites,
        int32_t stream_mode,
        int32_t n_rows,
        bool keep);

    // Read the tokens of seq at p0 <= p < p1 (p1 < 0: no end) when they are computed. Where the last layer holds output tokens
    // only, a capture on it makes llama_decode() fail for a wanted token that is no output. A token shared by several sequences is read
    // once, for the first of them that wants it.
    LLAMA_API int32_t llama_steer_capture_range(struct llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, bool wanted);

    // The rows kept so far, in the order they were computed.
    LLAMA_API int32_t llama_steer_capture_count(const struct llama_context * ctx);
    LLAMA_API int32_t llama_steer_capture_index(const struct llama_context * ctx, llama_seq_id * seq, llama_pos * pos); // [count] each

    // Copy the rows of one capture: [count][n_streams or 1][n_embd] float32; n_floats must be just that many.
    LLAMA_API int32_t llama_steer_capture_get(const struct llama_context * ctx, int32_t il, int32_t site, float * out, size_t n_floats);
    LLAMA_API int32_t llama_steer_capture_clear(struct llama_context * ctx); // drop the rows, keep captures and ranges

    // ---- callbacks: both run outside the compute graph and split nothing ----

    struct llama_steer_rows {
        int32_t layer;
        int32_t site;
        int32_t n_rows;
        int32_t n_streams; // 1 unless the captures read all streams
        int32_t n_embd;
        const llama_seq_id * seq_id; // [n_rows]
        const llama_pos * pos;       // [n_rows]
        const float * data;          // [n_rows][n_streams][n_embd], valid during the call
    };

    struct llama_steer_tokens {
        int32_t n_tokens;
        int32_t n_vectors;           // highest vector + 1
        const llama_seq_id * seq_id; // [n_tokens]
        const llama_pos * pos;       // [n_tokens]
    };

    // After each ubatch, once for each capture that has wanted rows. Return false to make llama_decode() fail.
    // It may set and clear configs and ranges, which take effect in the next ubatch. Whatever would touch the graph or its buffers
    // (vectors, captures, a vector's first project or clamp, callbacks, llama_steer_free) is refused inside either callback, and
    // llama_decode() must not be called there.
    typedef bool (*llama_steer_read_callback)(const struct llama_steer_rows * rows, void * user_data);

    // Before each ubatch. c, g: [n_tokens][n_vectors], zero on entry; what is written is added to what the token's config gives,
    // at every layer and stream of the vector: h += c * scale * v + g * v (v^T h), v and scale as the vector has them there.
    // A vector needs to be used by a config with op project or clamp before g may be set for it. Where a token's config renorms, nothing
    // may be added.
    // Return false to make llama_decode() fail.
    typedef bool (*llama_steer_add_callback)(const struct llama_steer_tokens * tokens, float * c, float * g, void * user_data);

    LLAMA_API int32_t llama_steer_set_read_callback(struct llama_context * ctx, llama_steer_read_callback callback, void * user_data);
    LLAMA_API int32_t llama_steer_set_add_callback(struct llama_context * ctx, llama_steer_add_callback callback, void * user_data);

    // ---- whole state ----

    LLAMA_API int32_t llama_steer_get_stats(const struct llama_context * ctx, struct llama_steer_stats * out);

    // How often a (layer, site) was really edited with something that is not zero: the proof that a hook fired.
    LLAMA_API int64_t llama_steer_fired(const struct llama_context * ctx, int32_t il, int32_t site);

    // In how many ubatches a config did so: 0 for a place that it should edit and that none of its tokens was seen to pass.
    LLAMA_API int64_t llama_steer_config_fired(const struct llama_context * ctx, int32_t config, int32_t il, int32_t site);

    // Free everything: the context is as it was before the first call, callbacks included.
    LLAMA_API int32_t llama_steer_free(struct llama_context * ctx);

#ifdef __cplusplus
}
#endif

#endif // LLAMA_STEER_H
