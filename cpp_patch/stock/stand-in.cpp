// stand-in.cpp - see stand-in.h: just so much of ggml as the graphs of llama-steer-graph.cpp need.

#include "stand-in.h"

#include <cmath>
#include <cstring>

namespace {

size_t size_of(ggml_type type) {
    return type == GGML_TYPE_I64 ? 8 : 4;
}

ggml_tensor * add_tensor(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    ctx->tensors.emplace_back();
    ggml_tensor * t = &ctx->tensors.back();
    t->type = type;
    const int64_t ne[4] = { ne0, ne1, ne2, ne3 };
    size_t stride = size_of(type);
    for (int i = 0; i < 4; ++i) {
        t->ne[i] = ne[i];
        t->nb[i] = stride;
        stride *= ne[i];
    }
    return t;
}

ggml_tensor * new_tensor(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2 = 1, int64_t ne3 = 1) {
    ggml_tensor * t = add_tensor(ctx, type, ne0, ne1, ne2, ne3);
    t->own.assign(size_of(type) * ne0 * ne1 * ne2 * ne3, 0);
    t->data = t->own.data();
    t->buffer = &ctx->buffer;
    return t;
}

ggml_tensor * view(ggml_context * ctx, ggml_tensor * a, size_t offset, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1, int64_t ne3 = 1) {
    ggml_tensor * t = add_tensor(ctx, a->type, ne0, ne1, ne2, ne3);
    t->src[0] = a;
    t->data = a->data + offset;
    t->buffer = a->buffer;
    return t;
}

char * row_at(const ggml_tensor * t, int64_t r) {
    return t->data + r % t->ne[1] * t->nb[1] + r / t->ne[1] % t->ne[2] * t->nb[2] + r / (t->ne[1] * t->ne[2]) * t->nb[3];
}
float * row(const ggml_tensor * t, int64_t r) {
    return reinterpret_cast<float *>(row_at(t, r));
}

ggml_tensor * shaped_as(ggml_context * ctx, ggml_tensor * a, void (*op)(ggml_tensor *), ggml_tensor * b = nullptr) {
    ggml_tensor * t = new_tensor(ctx, GGML_TYPE_F32, a->ne[0], a->ne[1], a->ne[2], a->ne[3]);
    t->op = op;
    t->src[0] = a;
    t->src[1] = b;
    return t;
}

// each element by itself; b is repeated as far as it is smaller
template <typename F>
void each(ggml_tensor * t, F && f) {
    const ggml_tensor * b = t->src[1];
    for (int64_t r = 0; r < ggml_nrows(t); ++r) {
        const float * x = row(t->src[0], r);
        const float * y = b ? row(b, r % ggml_nrows(b)) : nullptr;
        float * out = row(t, r);
        for (int64_t i = 0; i < t->ne[0]; ++i) {
            out[i] = f(x[i], y ? y[i % b->ne[0]] : 0.0f);
        }
    }
}

} // namespace

ggml_tensor * ggml_new_tensor_1d(ggml_context * ctx, ggml_type type, int64_t ne0) {
    return new_tensor(ctx, type, ne0, 1);
}
ggml_tensor * ggml_new_tensor_2d(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1) {
    return new_tensor(ctx, type, ne0, ne1);
}
ggml_tensor * ggml_new_tensor_3d(ggml_context * ctx, ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2) {
    return new_tensor(ctx, type, ne0, ne1, ne2);
}
ggml_tensor * ggml_view_1d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, size_t offset) {
    return view(ctx, a, offset, ne0);
}
ggml_tensor * ggml_view_2d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, size_t nb1, size_t offset) {
    ggml_tensor * t = view(ctx, a, offset, ne0, ne1);
    t->nb[1] = nb1;
    t->nb[2] = t->nb[3] = nb1 * ne1;
    return t;
}
ggml_tensor * ggml_reshape_2d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1) {
    return view(ctx, a, 0, ne0, ne1);
}
ggml_tensor * ggml_reshape_4d(ggml_context * ctx, ggml_tensor * a, int64_t ne0, int64_t ne1, int64_t ne2, int64_t ne3) {
    return view(ctx, a, 0, ne0, ne1, ne2, ne3);
}

ggml_tensor * ggml_cont(ggml_context * ctx, ggml_tensor * a) {
    return shaped_as(ctx, a, [](ggml_tensor * t) { each(t, [](float x, float) { return x; }); });
}
ggml_tensor * ggml_add(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    return shaped_as(ctx, a, [](ggml_tensor * t) { each(t, [](float x, float y) { return x + y; }); }, b);
}
ggml_tensor * ggml_mul(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    return shaped_as(ctx, a, [](ggml_tensor * t) { each(t, [](float x, float y) { return x * y; }); }, b);
}
ggml_tensor * ggml_div(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    return shaped_as(ctx, a, [](ggml_tensor * t) { each(t, [](float x, float y) { return x / y; }); }, b);
}
ggml_tensor * ggml_sqr(ggml_context * ctx, ggml_tensor * a) {
    return shaped_as(ctx, a, [](ggml_tensor * t) { each(t, [](float x, float) { return x * x; }); });
}
ggml_tensor * ggml_sqrt(ggml_context * ctx, ggml_tensor * a) {
    return shaped_as(ctx, a, [](ggml_tensor * t) { each(t, [](float x, float) { return std::sqrt(x); }); });
}
ggml_tensor * ggml_step(ggml_context * ctx, ggml_tensor * a) {
    return shaped_as(ctx, a, [](ggml_tensor * t) { each(t, [](float x, float) { return x > 0.0f ? 1.0f : 0.0f; }); });
}
ggml_tensor * ggml_scale(ggml_context * ctx, ggml_tensor * a, float s) {
    return ggml_scale_bias(ctx, a, s, 0.0f);
}
ggml_tensor * ggml_scale_bias(ggml_context * ctx, ggml_tensor * a, float s, float b) {
    ggml_tensor * res = shaped_as(ctx, a, [](ggml_tensor * t) {
        const float s = t->params[0];
        const float b = t->params[1];
        each(t, [s, b](float x, float) { return x * s + b; });
    });
    res->params[0] = s;
    res->params[1] = b;
    return res;
}
ggml_tensor * ggml_sum_rows(ggml_context * ctx, ggml_tensor * a) {
    ggml_tensor * res = new_tensor(ctx, GGML_TYPE_F32, 1, a->ne[1], a->ne[2], a->ne[3]);
    res->src[0] = a;
    res->op = [](ggml_tensor * t) {
        for (int64_t r = 0; r < ggml_nrows(t); ++r) {
            const float * x = row(t->src[0], r);
            double sum = 0.0;
            for (int64_t i = 0; i < t->src[0]->ne[0]; ++i) {
                sum += x[i];
            }
            *row(t, r) = (float) sum;
        }
    };
    return res;
}
ggml_tensor * ggml_mul_mat(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    GGML_ASSERT(a->ne[0] == b->ne[0] && a->ne[2] == 1 && b->ne[2] == 1);
    ggml_tensor * res = new_tensor(ctx, GGML_TYPE_F32, a->ne[1], b->ne[1]);
    res->src[0] = a;
    res->src[1] = b;
    res->op = [](ggml_tensor * t) {
        const ggml_tensor * a = t->src[0];
        for (int64_t r = 0; r < t->ne[1]; ++r) {
            const float * y = row(t->src[1], r);
            for (int64_t k = 0; k < t->ne[0]; ++k) {
                const float * x = row(a, k);
                double sum = 0.0;
                for (int64_t i = 0; i < a->ne[0]; ++i) {
                    sum += (double) x[i] * y[i];
                }
                row(t, r)[k] = (float) sum;
            }
        }
    };
    return res;
}
ggml_tensor * ggml_get_rows(ggml_context * ctx, ggml_tensor * a, ggml_tensor * index) {
    ggml_tensor * res = new_tensor(ctx, GGML_TYPE_F32, a->ne[0], index->ne[0], index->ne[1], index->ne[2]);
    res->src[0] = a;
    res->src[1] = index;
    res->op = [](ggml_tensor * t) {
        for (int64_t k = 0; k < t->ne[2]; ++k) {
            const auto * index = reinterpret_cast<const int32_t *>(row_at(t->src[1], k));
            for (int64_t r = 0; r < t->ne[1]; ++r) {
                memcpy(t->data + k * t->nb[2] + r * t->nb[1], t->src[0]->data + k * t->src[0]->nb[2] + index[r] * t->src[0]->nb[1], t->nb[1]);
            }
        }
    };
    return res;
}
ggml_tensor * ggml_set_rows(ggml_context * ctx, ggml_tensor * a, ggml_tensor * rows, ggml_tensor * index) {
    ggml_tensor * res = view(ctx, a, 0, a->ne[0], a->ne[1], a->ne[2], a->ne[3]);
    res->src[1] = rows;
    res->src[2] = index;
    res->op = [](ggml_tensor * t) {
        const auto * index = reinterpret_cast<const int64_t *>(t->src[2]->data);
        for (int64_t r = 0; r < ggml_nrows(t->src[1]); ++r) {
            memcpy(t->data + index[r] * t->nb[1], row(t->src[1], r), t->ne[0] * sizeof(float));
        }
    };
    return res;
}

int64_t ggml_nrows(const ggml_tensor * t) {
    return t->ne[1] * t->ne[2] * t->ne[3];
}

bool ggml_is_contiguous(const ggml_tensor * t) {
    size_t stride = size_of(t->type);
    for (int i = 0; i < 4; ++i) {
        if (t->ne[i] != 1 && t->nb[i] != stride) {
            return false;
        }
        stride *= t->ne[i];
    }
    return true;
}

void ggml_compute_now(ggml_tensor * t) {
    if (t->ready) {
        return;
    }
    for (ggml_tensor * src : t->src) {
        if (src) {
            ggml_compute_now(src);
        }
    }
    if (t->op) {
        t->op(t);
    }
    t->ready = true;
}

void ggml_backend_tensor_get(const ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, t->data + offset, size);
}

void ggml_backend_tensor_set(ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy(t->data + offset, data, size);
}

ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors_from_buft(ggml_context * ctx, ggml_backend_buffer_type_t) {
    auto * res = new ggml_backend_buffer();
    for (const auto & t : ctx->tensors) {
        res->size += t.own.size();
    }
    return res;
}
