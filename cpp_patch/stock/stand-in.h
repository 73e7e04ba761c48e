// stand-in.h - what llama-steer-*.cpp use of llama.cpp and ggml, for a library that they are compiled into without either.
//
// The same sources that the patch adds to llama.cpp work here beside an unmodified one: see llama-steer-stock.cpp. Tensors are host memory,
// and a graph is computed by ggml_compute_now(), in float32 as ggml's own CPU back end does it; dot products are summed in double.
// Every header of llama.cpp that those sources include is a file in llama/ that includes this one.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(_WIN32)
#define LLAMA_API __declspec(dllexport)
#else
#define LLAMA_API __attribute__((visibility("default")))
#endif

// ---- ggml ----

enum ggml_type { GGML_TYPE_F32 = 0,
                 GGML_TYPE_I32 = 26,
                 GGML_TYPE_I64 = 27 };
enum ggml_prec { GGML_PREC_F32 };
enum ggml_backend_buffer_usage { GGML_BACKEND_BUFFER_USAGE_ANY,
                                 GGML_BACKEND_BUFFER_USAGE_WEIGHTS };

struct ggml_backend_buffer {
    size_t size = 0;
};
struct ggml_backend_device {};
struct ggml_backend_sched {};
typedef ggml_backend_buffer * ggml_backend_buffer_t;
typedef const char * ggml_backend_buffer_type_t;
typedef ggml_backend_device * ggml_backend_dev_t;
typedef ggml_backend_sched * ggml_backend_sched_t;

struct ggml_tensor {
    ggml_type type = GGML_TYPE_F32;
    ggml_backend_buffer * buffer = nullptr;
    int64_t ne[4] = { 1, 1, 1, 1 };
    size_t nb[4] = { 0, 0, 0, 0 };
    ggml_tensor * src[3] = { nullptr, nullptr, nullptr };
    void (*op)(ggml_tensor * t) = nullptr; // null: given, or a view of src[0]
    float params[2] = { 0.0f, 0.0f };
    bool ready = false;
    char * data = nullptr;
    std::vector<char> own;
};

struct ggml_context {
    std::deque<ggml_tensor> tensors; // they keep their places
    ggml_backend_buffer buffer;
};
struct ggml_cgraph {
    std::vector<ggml_tensor *> nodes;
};
struct ggml_init_params {
    size_t mem_size;
    void * mem_buffer;
    bool no_alloc;
};

typedef std::unique_ptr<ggml_context> ggml_context_ptr;
typedef std::unique_ptr<ggml_backend_buffer> ggml_backend_buffer_ptr;

#define GGML_ASSERT(x)                         \
    do {                                       \
        if (!(x)) {                            \
            throw std::logic_error("not " #x); \
        }                                      \
    } while (0)

inline size_t ggml_tensor_overhead() {
    return sizeof(ggml_tensor);
}
inline ggml_context * ggml_init(ggml_init_params) {
    return new ggml_context();
}
ggml_tensor * ggml_new_tensor_1d(ggml_context * ctx, ggml_type type, int64_t ne0);
ggml_tensor * ggml_new_tensor_2d(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1);
ggml_tensor * ggml_new_tensor_3d(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2);
ggml_tensor * ggml_view_1d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, size_t offset);
ggml_tensor * ggml_view_2d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, size_t nb1, size_t offset);
ggml_tensor * ggml_reshape_2d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1);
ggml_tensor * ggml_reshape_4d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3);
ggml_tensor * ggml_cont(ggml_context * ctx, ggml_tensor * a);
ggml_tensor * ggml_add(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b);
ggml_tensor * ggml_mul(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b);
ggml_tensor * ggml_div(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b);
ggml_tensor * ggml_sqr(ggml_context * ctx, ggml_tensor * a);
ggml_tensor * ggml_sqrt(ggml_context * ctx, ggml_tensor * a);
ggml_tensor * ggml_step(ggml_context * ctx, ggml_tensor * a);
ggml_tensor * ggml_scale(ggml_context * ctx, ggml_tensor * a, float s);
ggml_tensor * ggml_scale_bias(ggml_context * ctx, ggml_tensor * a, float s, float b);
ggml_tensor * ggml_sum_rows(ggml_context * ctx, ggml_tensor * a);
ggml_tensor * ggml_mul_mat(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b);
ggml_tensor * ggml_get_rows(ggml_context * ctx, ggml_tensor * a, ggml_tensor * index);
ggml_tensor * ggml_set_rows(ggml_context * ctx, ggml_tensor * a, ggml_tensor * rows, ggml_tensor * index);
int64_t ggml_nrows(const ggml_tensor * t);
bool ggml_is_contiguous(const ggml_tensor * t);
inline void ggml_prec_set_acc(ggml_tensor *, ggml_prec) {}
inline void ggml_set_input(ggml_tensor *) {}
inline void ggml_set_name(ggml_tensor *, const char *) {}
inline void ggml_build_forward_expand(ggml_cgraph * graph, ggml_tensor * t) {
    graph->nodes.push_back(t);
}
void ggml_compute_now(ggml_tensor * t);

void ggml_backend_tensor_get(const ggml_tensor * t, void * data, size_t offset, size_t size);
void ggml_backend_tensor_set(ggml_tensor * t, const void * data, size_t offset, size_t size);
ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors_from_buft(ggml_context * ctx, ggml_backend_buffer_type_t buft);
inline void ggml_backend_buffer_set_usage(ggml_backend_buffer_t, ggml_backend_buffer_usage) {}
inline void ggml_backend_buffer_clear(ggml_backend_buffer_t, uint8_t) {} // it is new
inline size_t ggml_backend_buffer_get_size(ggml_backend_buffer_t buffer) {
    return buffer->size;
}
inline const char * ggml_backend_buft_name(ggml_backend_buffer_type_t buft) {
    return buft;
}
inline ggml_backend_dev_t ggml_backend_buft_get_device(ggml_backend_buffer_type_t) {
    return nullptr; // the CPU's own
}
inline const char * ggml_backend_dev_name(ggml_backend_dev_t) {
    return "CPU";
}
inline bool ggml_backend_dev_supports_op(ggml_backend_dev_t, const ggml_tensor *) {
    return true;
}
inline const char * ggml_op_desc(const ggml_tensor *) {
    return "";
}
inline void ggml_backend_sched_synchronize(ggml_backend_sched_t) {}

// ---- llama.cpp ----

typedef int32_t llama_pos;
typedef int32_t llama_seq_id;
typedef std::string llm_arch;

enum llama_context_type { LLAMA_CONTEXT_TYPE_DEFAULT };
enum llama_pooling_type { LLAMA_POOLING_TYPE_NONE };

#define LLAMA_LOG_ERROR(...) ((void) 0) // whoever calls tells

inline const char * llm_arch_name(const llm_arch & arch) {
    return arch.c_str();
}

inline std::string format(const char * text, ...) {
    char buf[1024];
    va_list args;
    va_start(args, text);
    vsnprintf(buf, sizeof(buf), text, args);
    va_end(args);
    return buf;
}

struct llama_ubatch {
    uint32_t n_tokens;
    const llama_pos * pos;
    const int32_t * n_seq_id;
    llama_seq_id * const * seq_id;
    const int8_t * output;
};

struct llama_hparams {
    uint32_t layers = 0;
    uint32_t n_embd = 0;
    bool no_alloc = false;

    uint32_t n_layer() const { return layers; }
};

struct llama_model {
    llm_arch arch;
    llama_hparams hparams;

    virtual ~llama_model() = default;
    ggml_backend_buffer_type_t select_buft(int) const { return "the host"; }
};

struct llama_cparams {
    bool embeddings = false;
    llama_context_type ctx_type = LLAMA_CONTEXT_TYPE_DEFAULT;
};

struct llama_adapter_cvec {};

struct llama_memory_context {};
struct llama_memory {
    std::unique_ptr<llama_memory_context> init_full() { return nullptr; }
};

struct llama_context {
    explicit llama_context(const llama_model & model)
        : model(model) {}
    virtual ~llama_context() = default;

    const llama_model & model;
    llama_cparams cparams;
    uint32_t batch_size = 1;
    uint32_t sequences = 1;
    std::shared_ptr<llama_adapter_cvec> cvec;
    std::unique_ptr<llama_memory> memory;
    bool sched_need_reserve = false;

    const llama_model & get_model() const { return model; }
    const llama_cparams & get_cparams() const { return cparams; }
    llama_pooling_type pooling_type() const { return LLAMA_POOLING_TYPE_NONE; }
    ggml_backend_sched_t get_sched() const { return nullptr; }
    uint32_t n_ubatch() const { return batch_size; }
    uint32_t n_seq_max() const { return sequences; }
    void synchronize() {}
    void sched_reserve() {}

    // Here it shows the hooks what was seen of the real graph.
    virtual void graph_reserve(uint32_t n_tokens, uint32_t n_seqs, uint32_t n_outputs, const llama_memory_context * memory, bool split_only) = 0;
};

struct llama_context_params {
    uint32_t n_ctx, n_batch, n_ubatch, n_seq_max;
};
typedef std::unique_ptr<llama_context> llama_context_ptr;
inline llama_context_params llama_context_default_params() {
    return {};
}
inline llama_context * llama_init_from_model(llama_model *, llama_context_params) {
    return nullptr; // contexts are the other library's
}

struct llm_graph_params {
    llama_ubatch ubatch;
    uint32_t n_outputs;
};

class llm_graph_input_i {
public:
    virtual ~llm_graph_input_i() = default;
    virtual void set_input(const llama_ubatch * ubatch) = 0;
    virtual bool can_reuse(const llm_graph_params &) { return false; }
};

struct llm_graph_result {
    std::vector<std::unique_ptr<llm_graph_input_i>> inputs;

    llm_graph_input_i * add_input(std::unique_ptr<llm_graph_input_i> input) {
        inputs.push_back(std::move(input));
        return inputs.back().get();
    }
};

struct llm_graph_context {
    int64_t n_tokens;
    int64_t n_outputs;
    const llama_adapter_cvec * cvec;
    ggml_context * ctx0;
    ggml_cgraph * gf;
    llm_graph_result * res;
};
