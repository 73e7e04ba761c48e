// The steering C API from C++, on a tiny model given as argument: what scripts/asan runs under the sanitizers.
// It walks through every function, good and bad arguments, and the lifetimes that could leave a dangling pointer.
// Numbers are checked against the formula, loosely (1e-3): exact comparisons are tests/engine's.

#include "llama-steer.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

static int n_checks = 0;

#define CHECK(cond)                                                                  \
    do {                                                                             \
        n_checks++;                                                                  \
        if (!(cond)) {                                                               \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond);       \
            exit(1);                                                                 \
        }                                                                            \
    } while (0)

static void check_ok(llama_context * ctx, int32_t code, int line) {
    n_checks++;
    if (code != LLAMA_STEER_OK) {
        fprintf(stderr, "line %d: code %d: %s\n", line, code, llama_steer_error(ctx));
        exit(1);
    }
}
#define OK(ctx, call) check_ok(ctx, call, __LINE__)

struct model_holder {
    llama_model *    model;
    llama_steer_info info;
    int32_t          n_vocab;
};

struct context {
    const model_holder & m;
    llama_context *      ctx;

    context(const model_holder & m, uint32_t n_ubatch = 5, uint32_t n_seq = 3) : m(m) {
        auto params            = llama_context_default_params();
        params.n_ctx           = 256 * n_seq;
        params.n_batch         = 64;
        params.n_ubatch        = n_ubatch;
        params.n_seq_max       = n_seq;
        params.n_threads       = 1;
        params.n_threads_batch = 1;
        ctx = llama_init_from_model(m.model, params);
        CHECK(ctx);
    }
    ~context() { llama_free(ctx); }
    context(const context &) = delete;

    operator llama_context *() { return ctx; }
    void forget() { llama_memory_clear(llama_get_memory(ctx), true); }

    // n tokens from pos on; the last one is an output, or all are
    int32_t decode(int32_t pos, int32_t n, llama_seq_id seq = 0, bool all = true) {
        auto batch = llama_batch_init(n, 0, 1);
        batch.n_tokens = n;
        for (int32_t i = 0; i < n; ++i) {
            batch.token[i]     = 40 + (7*(pos + i) + 31*seq) % 150;
            batch.pos[i]       = pos + i;
            batch.n_seq_id[i]  = 1;
            batch.seq_id[i][0] = seq;
            batch.logits[i]    = all || i == n - 1;
        }
        const int32_t code = llama_decode(ctx, batch);
        llama_batch_free(batch);
        return code;
    }

    std::vector<float> logits(int32_t i = -1) {
        const float * p = llama_get_logits_ith(ctx, i);
        CHECK(p);
        return std::vector<float>(p, p + m.n_vocab);
    }

    // fresh cache, one prompt, logits of its last token
    std::vector<float> run(int32_t n = 12) {
        forget();
        CHECK(decode(0, n) == 0);
        return logits();
    }
};

static float distance(const std::vector<float> & a, const std::vector<float> & b) {
    CHECK(a.size() == b.size());
    float most = 0.0f;
    for (size_t i = 0; i < a.size(); ++i) {
        CHECK(std::isfinite(a[i]) && std::isfinite(b[i]));
        most = std::max(most, std::fabs(a[i] - b[i]));
    }
    return most;
}

static std::vector<float> unit(int32_t n_embd, uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    std::vector<float> v(n_embd);
    double sq = 0.0;
    for (auto & x : v) {
        x = normal(rng);
        sq += (double) x*x;
    }
    for (auto & x : v) {
        x = (float) (x/std::sqrt(sq));
    }
    return v;
}

struct steer_vector {
    std::vector<int32_t> layers, sites;
    std::vector<float>   dirs;
    std::vector<double>  scales;

    int32_t put(llama_context * ctx, int32_t id) const {
        return llama_steer_vector_set(ctx, id, (int32_t) layers.size(), layers.data(), sites.data(), dirs.data(), scales.data());
    }
};

static steer_vector make_vector(const model_holder & m, std::vector<int32_t> layers, uint32_t seed, double scale = 2.0, int32_t site = LLAMA_STEER_RESID_POST) {
    steer_vector c;
    for (int32_t il : layers) {
        const auto v = unit(m.info.n_embd, seed*1000 + il);
        c.layers.push_back(il);
        c.sites.push_back(site);
        c.dirs.insert(c.dirs.end(), v.begin(), v.end());
        c.scales.push_back(scale);
    }
    return c;
}

static llama_steer_term term(int32_t vector, int32_t op = LLAMA_STEER_ADD, double strength = 1.0, int32_t first = -1, int32_t last = -1,
        int32_t stream = LLAMA_STEER_STREAM_ALL, double level = 0.0) {
    return { vector, op, strength, first, last, stream, level };
}

static int32_t set_config(llama_context * ctx, int32_t id, const std::vector<llama_steer_term> & terms) {
    return llama_steer_config_set(ctx, id, (int32_t) terms.size(), terms.data());
}

// rows of one layer, all streams, of a prompt of n tokens
static std::vector<float> read(context & c, int32_t il, int32_t site, int32_t n) {
    OK(c, llama_steer_capture_set(c, 1, &il, &site, LLAMA_STEER_STREAM_ALL, 0, true));
    OK(c, llama_steer_capture_range(c, 0, 0, -1, true));
    c.forget();
    CHECK(c.decode(0, n) == 0);
    CHECK(llama_steer_capture_count(c) == n);
    const size_t streams = site == LLAMA_STEER_RESID_POST ? c.m.info.n_streams : 1;
    std::vector<float> rows(n*streams*c.m.info.n_embd);
    OK(c, llama_steer_capture_get(c, il, site, rows.data(), rows.size()));
    std::vector<llama_seq_id> seqs(n);
    std::vector<llama_pos>    poss(n);
    OK(c, llama_steer_capture_index(c, seqs.data(), poss.data()));
    for (int32_t i = 0; i < n; ++i) {
        CHECK(seqs[i] == 0 && poss[i] == i);
    }
    OK(c, llama_steer_capture_set(c, 0, nullptr, nullptr, LLAMA_STEER_STREAM_MEAN, 0, true));
    return rows;
}

// ---- the parts ----

static void test_formula(const model_holder & m) {
    for (uint32_t n_ubatch : { 1, 3, 4, 5, 64 }) {
        context c(m, n_ubatch, 1);
        const auto plain = c.run();
        for (int32_t site = 0; site < LLAMA_STEER_SITE_COUNT; ++site) {
            if (!m.info.sites[site]) {
                continue;
            }
            for (int32_t il : { 0, m.info.n_layer/2, m.info.n_layer - 1 }) {
                OK(c, llama_steer_seq_clear(c, -1));
                const auto before = read(c, il, site, 9);
                const auto col = make_vector(m, { il }, 1, 2.0, site);
                OK(c, col.put(c, 0));
                for (int32_t op : { LLAMA_STEER_ADD, LLAMA_STEER_PROJECT, LLAMA_STEER_CLAMP }) {
                    OK(c, set_config(c, 1, { term(0, op, 0.5) }));
                    OK(c, llama_steer_range(c, 0, 0, -1, 1));
                    const auto after = read(c, il, site, 9);
                    for (size_t r = 0; r < before.size(); r += m.info.n_embd) {
                        double along = 0.0;
                        for (int32_t i = 0; i < m.info.n_embd; ++i) {
                            along += (double) before[r + i]*col.dirs[i];
                        }
                        const double move = op == LLAMA_STEER_ADD ? 0.5*2.0 : op == LLAMA_STEER_PROJECT ? -0.5*along : 0.5*2.0 - along;
                        for (int32_t i = 0; i < m.info.n_embd; ++i) {
                            CHECK(std::fabs(after[r + i] - before[r + i] - move*col.dirs[i]) < 1e-3);
                        }
                    }
                    CHECK(llama_steer_fired(c, il, site) > 0);
                }
                OK(c, set_config(c, 1, {}));
            }
        }
        CHECK(distance(c.run(), plain) == 0.0f);
    }
}

// A column reads one row and writes another; floors read against a direction. Vectors come and go, and with them the rows that read.
static void test_columns(const model_holder & m) {
    const int32_t n_embd = m.info.n_embd;
    context c(m, 4, 1);
    const auto plain = c.run();
    const auto base = make_vector(m, { 0, 1 }, 3);
    const auto reads = unit(n_embd, 41), writes = unit(n_embd, 42);
    OK(c, llama_steer_seq_clear(c, -1));
    const auto before = read(c, 1, LLAMA_STEER_RESID_POST, 9);
    for (double knee : { -std::numeric_limits<double>::infinity(), 0.0, 0.5 }) {
        const llama_steer_column column = { 1, LLAMA_STEER_RESID_POST, -0.7, 0.2, knee };
        const llama_steer_vector vector = { "", 2, base.layers.data(), base.sites.data(), base.dirs.data(), base.scales.data(),
                                            1, &column, reads.data(), writes.data() };
        OK(c, llama_steer_vector_put(c, 0, &vector));
        OK(c, set_config(c, 1, { term(0, LLAMA_STEER_PROJECT, 1.0, 1, 1) }));
        OK(c, llama_steer_range(c, 0, 0, -1, 1));
        const auto after = read(c, 1, LLAMA_STEER_RESID_POST, 9);
        for (size_t r = 0; r < before.size(); r += n_embd) {
            double z = 0.2;
            for (int32_t i = 0; i < n_embd; ++i) {
                z += (double) before[r + i]*reads[i];
            }
            const double move = z > knee ? -0.7*z : 0.0;
            for (int32_t i = 0; i < n_embd && std::fabs(z - knee) > 1e-3; ++i) {
                CHECK(std::fabs(after[r + i] - before[r + i] - move*writes[i]) < 1e-3);
            }
        }
        auto bad = vector;
        bad.n_columns = 1 << 30;
        CHECK(llama_steer_vector_put(c, 0, &bad) < 0);
        bad.n_columns = 1;
        bad.reads = nullptr;
        CHECK(llama_steer_vector_put(c, 0, &bad) < 0);
        CHECK(llama_steer_vector_put(c, 0, nullptr) < 0);
        CHECK(set_config(c, 2, { term(0, LLAMA_STEER_FLOOR, 1.0, -1, -1, LLAMA_STEER_STREAM_ALL, 0.1) }) < 0);
        OK(c, llama_steer_config_clear(c, 1));
        OK(c, llama_steer_vector_clear(c, 0));
    }
    OK(c, base.put(c, 0));
    for (double level : { -1e9, 0.3, 1.0 }) {
        OK(c, set_config(c, 1, { term(0, LLAMA_STEER_FLOOR, 1.0, 1, 1, LLAMA_STEER_STREAM_ALL, level) }));
        OK(c, llama_steer_range(c, 0, 0, -1, 1));
        const auto after = read(c, 1, LLAMA_STEER_RESID_POST, 9);
        for (size_t r = 0; r < after.size(); r += n_embd) {
            double along = 0.0;
            for (int32_t i = 0; i < n_embd; ++i) {
                along += (double) after[r + i]*base.dirs[n_embd + i];
            }
            CHECK(along > 2.0*level - 1e-3);
        }
    }
    OK(c, set_config(c, 1, {}));
    CHECK(distance(c.run(), plain) == 0.0f);
}

static void test_many(const model_holder & m) {
    context c(m);
    std::vector<int32_t> every;
    for (int32_t il = 0; il < m.info.n_layer; ++il) {
        every.push_back(il);
    }
    const auto plain = c.run();

    // vectors that add, vectors that project in turns, more configs in a batch than rows
    for (int32_t k = 0; k < 80; ++k) {
        OK(c, make_vector(m, every, 10 + k, 0.1).put(c, k == 79 ? LLAMA_STEER_MAX_VECTORS - 1 : k));
    }
    std::vector<llama_steer_term> terms;
    for (int32_t k = 0; k < 79; ++k) {
        terms.push_back(term(k, LLAMA_STEER_ADD, 0.3));
    }
    OK(c, set_config(c, 1, terms));
    OK(c, llama_steer_range(c, 0, 0, -1, 1));
    CHECK(distance(c.run(), plain) > 0.0f);
    for (int32_t k = 0; k < 79; ++k) {
        OK(c, set_config(c, 2, { term(k, LLAMA_STEER_PROJECT, 0.5), term((k + 1) % 79, LLAMA_STEER_CLAMP, 0.5) }));
        OK(c, llama_steer_range(c, 0, 3, 7, 2));
        if (k % 8 == 0 || k > 60) {
            c.run(8);
        }
    }
    for (int32_t p = 0; p < 40; ++p) {
        OK(c, set_config(c, 10 + p, { term(p, LLAMA_STEER_ADD, 0.01*p), term(p % 8, LLAMA_STEER_PROJECT, 0.1) }));
        OK(c, llama_steer_range(c, 0, p, p + 1, 10 + p));
    }
    context wide(m, 64);
    for (int round = 0; round < 3; ++round) {
        c.run(40);
    }
    for (int32_t p = 0; p < 60; ++p) {
        OK(wide, make_vector(m, every, p, 0.1).put(wide, p));
        OK(wide, set_config(wide, 1 + p, { term(p) }));
        OK(wide, llama_steer_range(wide, 0, p, p + 1, 1 + p));
    }
    wide.run(60);
    llama_steer_stats stats;
    OK(wide, llama_steer_get_stats(wide, &stats));
    CHECK(stats.n_rows_capacity >= 61 && stats.n_device_bytes > 0);

    // several sequences in one batch, and tokens that sequences share
    OK(c, llama_steer_seq_clear(c, -1));
    OK(c, llama_steer_range(c, 1, 2, 5, 2));
    c.forget();
    auto batch = llama_batch_init(20, 0, 3);
    batch.n_tokens = 20;
    for (int32_t i = 0; i < 20; ++i) {
        batch.token[i]     = 50 + i;
        batch.pos[i]       = i/2;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = i % 2;
        batch.logits[i]    = i % 3 == 0;
    }
    CHECK(llama_decode(c, batch) == 0);
    llama_batch_free(batch);

    // vectors in use, replaced, cleared, set again
    CHECK(llama_steer_vector_clear(c, 0) == LLAMA_STEER_ERR_ARG);
    for (int32_t k = 0; k < 20; ++k) {
        OK(c, make_vector(m, { k % m.info.n_layer }, 500 + k).put(c, 3000));
        OK(c, set_config(c, 5, { term(3000, k % 3) }));
        OK(c, llama_steer_range(c, 0, 0, -1, 5));
        c.run(6);
        OK(c, llama_steer_config_clear(c, 5));
        OK(c, llama_steer_vector_clear(c, 3000));
    }
    OK(c, llama_steer_seq_clear(c, -1));
    CHECK(distance(c.run(), plain) == 0.0f);
}

static void test_captures(const model_holder & m) {
    context c(m);
    const auto plain = c.run();
    std::vector<int32_t> layers, sites;
    for (int32_t il = 0; il < m.info.n_layer; ++il) {
        for (int32_t site = 0; site < LLAMA_STEER_SITE_COUNT; ++site) {
            if (m.info.sites[site]) {
                layers.push_back(il);
                sites.push_back(site);
            }
        }
    }
    const int32_t n_taps = (int32_t) layers.size();
    for (int32_t mode : { LLAMA_STEER_STREAM_MEAN, LLAMA_STEER_STREAM_ALL, LLAMA_STEER_STREAM_MEAN }) {
        OK(c, llama_steer_capture_set(c, n_taps, layers.data(), sites.data(), mode, std::numeric_limits<int32_t>::max(), true));
        OK(c, llama_steer_capture_range(c, 0, 2, 9, true));
        c.run();
        CHECK(llama_steer_capture_count(c) == 7);
        for (int32_t i = 0; i < n_taps; ++i) {
            const size_t streams = sites[i] == LLAMA_STEER_RESID_POST && mode == LLAMA_STEER_STREAM_ALL ? m.info.n_streams : 1;
            std::vector<float> rows(7*streams*m.info.n_embd);
            OK(c, llama_steer_capture_get(c, layers[i], sites[i], rows.data(), rows.size()));
            for (float x : rows) {
                CHECK(std::isfinite(x));
            }
            CHECK(llama_steer_capture_get(c, layers[i], sites[i], rows.data(), rows.size() - 1) == LLAMA_STEER_ERR_ARG);
        }
        OK(c, llama_steer_capture_clear(c));
        CHECK(llama_steer_capture_count(c) == 0);
    }
    CHECK(distance(c.run(), plain) == 0.0f);
    // captures change between decodes while others are kept
    for (int32_t k = 0; k < 12; ++k) {
        const int32_t n = 1 + k % n_taps;
        OK(c, llama_steer_capture_set(c, n, layers.data() + n_taps - n, sites.data() + n_taps - n, LLAMA_STEER_STREAM_ALL, 3 + k, k % 2));
        CHECK(c.decode(12 + k, 1) == 0);
    }
    // too many rows for the captures; a token that the last layer does not hold
    OK(c, llama_steer_capture_set(c, 1, layers.data(), sites.data(), LLAMA_STEER_STREAM_MEAN, 2, true));
    const int32_t last[2] = { m.info.n_layer - 1, 0 };
    const int32_t resid[2] = { 0, 0 };
    OK(c, llama_steer_capture_set(c, 2, last, resid, LLAMA_STEER_STREAM_MEAN, 2, true));
    OK(c, llama_steer_seq_clear(c, -1));
    OK(c, llama_steer_capture_range(c, 0, 0, -1, true));
    c.forget();
    CHECK(c.decode(0, 12) == 0 && llama_steer_seq_error(c, 0) == LLAMA_STEER_ERR_LIMIT && strstr(llama_steer_error(c), "more than 2 tokens"));
    OK(c, llama_steer_capture_set(c, 2, last, resid, LLAMA_STEER_STREAM_MEAN, 0, true));
    c.forget();
    CHECK(c.decode(0, 12, 0, false) == 0);
    CHECK(llama_steer_seq_error(c, -1) == (m.info.last_layer_outputs_only ? LLAMA_STEER_ERR_ARG : LLAMA_STEER_OK));
    CHECK(llama_steer_seq_error(c, -1) == LLAMA_STEER_OK);
    OK(c, llama_steer_seq_clear(c, -1));
    CHECK(distance(c.run(), plain) == 0.0f);
}

// ---- callbacks ----

struct callback_data {
    llama_context * ctx = nullptr;
    const steer_vector *  col = nullptr;
    int  calls   = 0;
    int  stop_at = -1;
    bool naughty = false;
};

// everything that must be refused inside a callback
static void try_all(callback_data & d) {
    const int32_t zero = 0;
    CHECK(d.col->put(d.ctx, 0) < 0);
    CHECK(d.col->put(d.ctx, 17) < 0);
    CHECK(llama_steer_vector_clear(d.ctx, 1) < 0);
    CHECK(llama_steer_capture_set(d.ctx, 1, &zero, &zero, LLAMA_STEER_STREAM_MEAN, 0, true) < 0);
    CHECK(llama_steer_capture_set(d.ctx, 0, nullptr, nullptr, LLAMA_STEER_STREAM_MEAN, 0, true) < 0);
    CHECK(llama_steer_capture_clear(d.ctx) < 0);
    CHECK(llama_steer_set_read_callback(d.ctx, nullptr, nullptr) < 0);
    CHECK(llama_steer_set_add_callback(d.ctx, nullptr, nullptr) < 0);
    CHECK(llama_steer_free(d.ctx) < 0);
    // and what must not
    OK(d.ctx, set_config(d.ctx, 1, { term(0, LLAMA_STEER_ADD, 0.1*d.calls) }));
    OK(d.ctx, set_config(d.ctx, 9, { term(1, LLAMA_STEER_ADD, 0.1*d.calls) }));
    OK(d.ctx, llama_steer_range(d.ctx, 0, d.calls, d.calls + 3, 9));
    OK(d.ctx, llama_steer_config_clear(d.ctx, 9));
    OK(d.ctx, llama_steer_capture_range(d.ctx, 2, 1, -1, true));
    (void) llama_steer_edit_id(d.ctx, 0, 3);
    llama_steer_stats stats;
    OK(d.ctx, llama_steer_get_stats(d.ctx, &stats));
}

static bool on_read(const llama_steer_rows * rows, void * data) {
    auto & d = *static_cast<callback_data *>(data);
    CHECK(rows->n_rows > 0 && rows->n_embd > 0 && rows->n_streams >= 1);
    float sum = 0.0f;
    for (int32_t i = 0; i < rows->n_rows; ++i) {
        CHECK(rows->seq_id[i] >= 0 && rows->pos[i] >= 0);
        for (int32_t j = 0; j < rows->n_streams*rows->n_embd; ++j) {
            sum += rows->data[(size_t) i*rows->n_streams*rows->n_embd + j];
        }
    }
    CHECK(std::isfinite(sum));
    if (d.naughty) {
        try_all(d);
    }
    return d.calls++ != d.stop_at;
}

static bool on_add(const llama_steer_tokens * tokens, float * c, float * g, void * data) {
    auto & d = *static_cast<callback_data *>(data);
    for (int32_t i = 0; i < tokens->n_tokens*tokens->n_vectors; ++i) {
        CHECK(c[i] == 0.0f && g[i] == 0.0f);
    }
    for (int32_t i = 0; i < tokens->n_tokens; ++i) {
        c[(size_t) i*tokens->n_vectors] = 0.1f*tokens->pos[i];
        g[(size_t) i*tokens->n_vectors] = -0.5f;
    }
    if (d.naughty) {
        try_all(d);
    }
    return d.calls++ != d.stop_at;
}

static void test_callbacks(const model_holder & m) {
    context c(m);
    const auto plain = c.run();
    const auto col = make_vector(m, { 0, 1, m.info.n_layer - 1 }, 3);
    OK(c, make_vector(m, { 1, 2 }, 4).put(c, 0));
    OK(c, make_vector(m, { 2 }, 5).put(c, 1));
    OK(c, set_config(c, 2, { term(0, LLAMA_STEER_PROJECT) }));
    OK(c, set_config(c, 1, { term(0) }));
    OK(c, llama_steer_range(c, 0, 2, -1, 1));
    const int32_t layers[2] = { 1, 2 }, sites[2] = { 0, 0 };
    for (bool naughty : { false, true }) {
        for (int stop_at : { -1, 0, 1, 2, 3 }) {
            for (int which = 1; which <= 3; ++which) {
                callback_data r, a;
                r.ctx = a.ctx = c;
                r.col = a.col = &col;
                r.naughty = a.naughty = naughty;
                r.stop_at = a.stop_at = stop_at;
                OK(c, llama_steer_capture_set(c, 2, layers, sites, stop_at % 2 ? LLAMA_STEER_STREAM_ALL : LLAMA_STEER_STREAM_MEAN, 0, stop_at != 3));
                OK(c, llama_steer_capture_range(c, 0, 0, -1, true));
                OK(c, llama_steer_set_read_callback(c, which & 1 ? on_read : nullptr, &r));
                OK(c, llama_steer_set_add_callback(c, which & 2 ? on_add : nullptr, &a));
                c.forget();
                const int32_t code = c.decode(0, 13);
                CHECK(code == 0 || (code == -3 && stop_at >= 0));
                CHECK(strlen(llama_steer_error(c)) > 0);
                const int32_t n = llama_steer_capture_count(c);
                std::vector<float> rows((size_t) (n + 1)*m.info.n_streams*m.info.n_embd);
                OK(c, llama_steer_capture_get(c, 1, 0, rows.data(), (size_t) n*(stop_at % 2 ? m.info.n_streams : 1)*m.info.n_embd));
                OK(c, llama_steer_set_read_callback(c, nullptr, nullptr));
                OK(c, llama_steer_set_add_callback(c, nullptr, nullptr));
                c.run(); // works again, and asks nobody
            }
        }
    }
    OK(c, llama_steer_free(c));
    CHECK(distance(c.run(), plain) == 0.0f);
}

// ---- bad arguments ----

static void test_bad_arguments(const model_holder & m) {
    context c(m);
    const int32_t n_embd = m.info.n_embd;
    OK(c, make_vector(m, { 1, 2 }, 1).put(c, 0));
    OK(c, set_config(c, 1, { term(0, LLAMA_STEER_CLAMP, 0.5) }));
    OK(c, llama_steer_range(c, 0, 0, -1, 1));
    const auto want = c.run();
    const auto id = llama_steer_edit_id(c, 0, 3);

    const float  nan = std::numeric_limits<float>::quiet_NaN();
    const float  inf = std::numeric_limits<float>::infinity();
    const int32_t none = 0, outside[2] = { 0, m.info.n_layer }, zeros[2] = { 0, 0 };
    auto good = make_vector(m, { 0, 1 }, 9);
    auto spoiled = [&](const std::function<void(steer_vector &)> & spoil) {
        auto bad = good;
        spoil(bad);
        return bad.put(c, 3);
    };
    std::vector<llama_steer_term> crowd(LLAMA_STEER_MAX_TERMS + 1, term(0));
    llama_steer_info info;
    llama_steer_stats stats;
    std::vector<float> out(n_embd);
    const std::vector<std::function<int32_t()>> calls = {
        [&] { return good.put(c, -1); },
        [&] { return good.put(c, LLAMA_STEER_MAX_VECTORS); },
        [&] { return good.put(nullptr, 0); },
        [&] { return llama_steer_vector_set(c, 3, 0, good.layers.data(), good.sites.data(), good.dirs.data(), good.scales.data()); },
        [&] { return llama_steer_vector_set(c, 3, std::numeric_limits<int32_t>::min(), good.layers.data(), good.sites.data(), good.dirs.data(), good.scales.data()); },
        [&] { return llama_steer_vector_set(c, 3, 1 << 30, good.layers.data(), good.sites.data(), good.dirs.data(), good.scales.data()); },
        [&] { return llama_steer_vector_set(c, 3, 2, nullptr, good.sites.data(), good.dirs.data(), good.scales.data()); },
        [&] { return llama_steer_vector_set(c, 3, 2, good.layers.data(), nullptr, good.dirs.data(), good.scales.data()); },
        [&] { return llama_steer_vector_set(c, 3, 2, good.layers.data(), good.sites.data(), nullptr, good.scales.data()); },
        [&] { return llama_steer_vector_set(c, 3, 2, good.layers.data(), good.sites.data(), good.dirs.data(), nullptr); },
        [&] { return spoiled([&](steer_vector & x) { x.layers[1] = m.info.n_layer; }); },
        [&] { return spoiled([&](steer_vector & x) { x.layers[1] = -1; }); },
        [&] { return spoiled([&](steer_vector & x) { x.layers[1] = std::numeric_limits<int32_t>::max(); }); },
        [&] { return spoiled([&](steer_vector & x) { x.layers[1] = 0; }); },
        [&] { return spoiled([&](steer_vector & x) { x.sites[1] = LLAMA_STEER_SITE_COUNT; }); },
        [&] { return spoiled([&](steer_vector & x) { x.sites[1] = -1; }); },
        [&] { return spoiled([&](steer_vector & x) { x.dirs[n_embd + 1] = nan; }); },
        [&] { return spoiled([&](steer_vector & x) { x.dirs[1] = -inf; }); },
        [&] { return spoiled([&](steer_vector & x) { x.dirs[1] += 1.0f; }); },
        [&] { return spoiled([&](steer_vector & x) { std::fill(x.dirs.begin(), x.dirs.end(), 0.0f); }); },
        [&] { return spoiled([&](steer_vector & x) { x.scales[1] = nan; }); },
        [&] { return spoiled([&](steer_vector & x) { x.scales[0] = inf; }); },
        [&] { return llama_steer_vector_clear(c, 0); },
        [&] { return llama_steer_vector_clear(c, 55); },
        [&] { return llama_steer_vector_clear(nullptr, 0); },
        [&] { return set_config(c, 0, { term(0) }); },
        [&] { return set_config(c, -1, { term(0) }); },
        [&] { return set_config(c, 1, crowd); },
        [&] { return llama_steer_config_set(c, 1, -1, crowd.data()); },
        [&] { return llama_steer_config_set(c, 1, 1, nullptr); },
        [&] { return llama_steer_config_set(nullptr, 1, 1, crowd.data()); },
        [&] { return set_config(c, 1, { term(0), term(44) }); },
        [&] { return set_config(c, 1, { term(0, 7) }); },
        [&] { return set_config(c, 1, { term(0, 0, nan) }); },
        [&] { return set_config(c, 1, { term(0, 0, inf) }); },
        [&] { return set_config(c, 1, { term(0, 0, 1e300) }); },
        [&] { return set_config(c, 1, { term(0, 0, 1.0, 2, 1) }); },
        [&] { return set_config(c, 1, { term(0, 0, 1.0, 3, -1) }); },
        [&] { return set_config(c, 1, { term(0, 0, 1.0, -1, 0) }); },
        [&] { return set_config(c, 1, { term(0, 0, 1.0, -1, -1, m.info.n_streams) }); },
        [&] { return set_config(c, 1, { term(0, 0, 1.0, -1, -1, -7) }); },
        [&] { return llama_steer_config_clear(c, 2); },
        [&] { return llama_steer_config_clear(nullptr, 1); },
        [&] { return llama_steer_range(c, -1, 0, -1, 1); },
        [&] { return llama_steer_range(c, 0, -1, -1, 1); },
        [&] { return llama_steer_range(c, 0, 4, 4, 1); },
        [&] { return llama_steer_range(c, 0, 0, -1, 8); },
        [&] { return llama_steer_range(nullptr, 0, 0, -1, 1); },
        [&] { return llama_steer_seq_clear(nullptr, 0); },
        [&] { return llama_steer_capture_set(c, -1, &none, &none, LLAMA_STEER_STREAM_MEAN, 0, true); },
        [&] { return llama_steer_capture_set(c, 1 << 30, &none, &none, LLAMA_STEER_STREAM_MEAN, 0, true); },
        [&] { return llama_steer_capture_set(c, 1, nullptr, &none, LLAMA_STEER_STREAM_MEAN, 0, true); },
        [&] { return llama_steer_capture_set(c, 1, &none, nullptr, LLAMA_STEER_STREAM_MEAN, 0, true); },
        [&] { return llama_steer_capture_set(c, 2, outside, zeros, LLAMA_STEER_STREAM_MEAN, 0, true); },
        [&] { return llama_steer_capture_set(c, 1, &none, &none, 3, 0, true); },
        [&] { return llama_steer_capture_set(c, 1, &none, &none, LLAMA_STEER_STREAM_MEAN, -1, true); },
        [&] { return llama_steer_capture_set(nullptr, 1, &none, &none, LLAMA_STEER_STREAM_MEAN, 0, true); },
        [&] { return llama_steer_capture_range(c, -1, 0, -1, true); },
        [&] { return llama_steer_capture_range(c, 0, 5, 2, true); },
        [&] { return llama_steer_capture_range(nullptr, 0, 0, -1, true); },
        [&] { return llama_steer_capture_get(c, 0, 0, out.data(), out.size()); },
        [&] { return llama_steer_capture_get(c, -5, 77, out.data(), out.size()); },
        [&] { return llama_steer_capture_get(c, 0, 0, nullptr, 1); },
        [&] { return llama_steer_capture_get(nullptr, 0, 0, out.data(), out.size()); },
        [&] { return llama_steer_capture_index(c, nullptr, nullptr); },
        [&] { return llama_steer_capture_index(nullptr, nullptr, nullptr); },
        [&] { return llama_steer_capture_clear(nullptr); },
        [&] { return llama_steer_set_read_callback(nullptr, on_read, nullptr); },
        [&] { return llama_steer_set_add_callback(nullptr, on_add, nullptr); },
        [&] { return llama_steer_get_stats(c, nullptr); },
        [&] { return llama_steer_get_stats(nullptr, &stats); },
        [&] { return llama_steer_model_info(nullptr, &info); },
        [&] { return llama_steer_model_info(m.model, nullptr); },
        [&] { return llama_steer_free(nullptr); },
    };
    for (size_t i = 0; i < calls.size(); ++i) {
        const int32_t code = calls[i]();
        if (code >= 0) {
            fprintf(stderr, "bad call %zu was accepted\n", i);
            exit(1);
        }
        CHECK(strlen(llama_steer_error(c)) > 0 && strlen(llama_steer_error(nullptr)) > 0);
        CHECK(llama_steer_edit_id(c, 0, 3) == id);
    }
    CHECK(distance(c.run(), want) == 0.0f);
    CHECK(llama_steer_edit_id(nullptr, 0, 0) == 0 && llama_steer_config_id(nullptr, 1) == 0);
    CHECK(llama_steer_capture_count(nullptr) == 0 && llama_steer_fired(nullptr, 0, 0) == 0);
    CHECK(llama_steer_fired(c, -1, 99) == 0);
    CHECK(!llama_steer_config_acts(nullptr, 1, 0, 0) && !llama_steer_config_acts(c, 99, -1, -1));
    CHECK(llama_steer_arch_name(-1) == nullptr && llama_steer_arch_name(1 << 30) == nullptr);
}

// ---- lifetimes ----

static void test_lifetimes(const model_holder & m) {
    // freed with everything on, in either order
    for (int order = 0; order < 2; ++order) {
        auto * a = new context(m);
        auto * b = new context(m, 64, 1);
        callback_data d;
        const int32_t layers[2] = { 0, 1 }, sites[2] = { 0, 0 };
        for (auto * c : { a, b }) {
            OK(*c, make_vector(m, { 0, 1, 2 }, 1).put(*c, 0));
            OK(*c, set_config(*c, 1, { term(0, LLAMA_STEER_CLAMP) }));
            OK(*c, llama_steer_range(*c, 0, 0, -1, 1));
            OK(*c, llama_steer_capture_set(*c, 2, layers, sites, LLAMA_STEER_STREAM_ALL, 0, true));
            OK(*c, llama_steer_capture_range(*c, 0, 0, -1, true));
            OK(*c, llama_steer_set_read_callback(*c, on_read, &d));
            c->run();
        }
        if (order == 0) {
            delete a;
            b->run();
            delete b;
        } else {
            delete b;
            a->run();
            OK(*a, llama_steer_free(*a));
            delete a;
        }
    }
    // llama_steer_free between decodes; setters without a decode between them; nothing at all
    context c(m);
    const auto plain = c.run();
    for (int k = 0; k < 4; ++k) {
        OK(c, make_vector(m, { k % m.info.n_layer }, 1).put(c, k));
        if (k % 2) {
            c.decode(12, 1);
        }
        OK(c, set_config(c, 1, { term(k, k % 3) }));
        OK(c, llama_steer_range(c, 0, 0, -1, 1));
        if (k != 2) {
            c.run();
        }
        if (k == 3) { // the next batch has the shape of the last graph, which must not be used again
            c.forget();
            CHECK(c.decode(0, 1) == 0 && c.decode(1, 1) == 0);
        }
        OK(c, llama_steer_free(c));
        OK(c, llama_steer_free(c));
        if (k == 3) {
            CHECK(c.decode(2, 1) == 0);
        }
        CHECK(distance(c.run(), plain) == 0.0f);
    }
    context untouched(m);
    (void) llama_steer_error(untouched);
    CHECK(llama_steer_capture_count(untouched) == 0);
    context unused(m);
    OK(unused, make_vector(m, { 0 }, 1).put(unused, 0));

    // on top of the stock control vector, which shares its object with the steering
    std::vector<float> data((size_t) (m.info.n_layer - 1)*m.info.n_embd, 0.01f);
    OK(c, llama_set_adapter_cvec(c, data.data(), data.size(), m.info.n_embd, 1, m.info.n_layer - 1));
    const auto stock = c.run();
    CHECK(distance(stock, plain) > 0.0f);
    OK(c, make_vector(m, { 1 }, 1).put(c, 0));
    OK(c, set_config(c, 1, { term(0) }));
    OK(c, llama_steer_range(c, 0, 0, -1, 1));
    CHECK(distance(c.run(), stock) > 0.0f);
    OK(c, llama_steer_free(c));
    CHECK(distance(c.run(), stock) == 0.0f);
    OK(c, llama_set_adapter_cvec(c, nullptr, 0, m.info.n_embd, 1, 1));
    CHECK(distance(c.run(), plain) == 0.0f);
}

// ---- plans ----

static void test_plans(const model_holder & m) {
    std::mt19937 rng(7);
    const auto pick = [&](int n) { return (int) (rng() % n); };
    std::vector<steer_vector> made;
    std::vector<std::string>  keys;
    std::vector<llama_steer_vector> vectors;
    for (int k = 0; k < 40; ++k) {
        made.push_back(make_vector(m, { k % m.info.n_layer, (k + 1) % m.info.n_layer }, 50 + k, 0.1));
        keys.push_back("vector " + std::to_string(k));
    }
    for (int k = 0; k < 40; ++k) {
        vectors.push_back({ keys[k].c_str(), 2, made[k].layers.data(), made[k].sites.data(), made[k].dirs.data(), made[k].scales.data(), 0, nullptr, nullptr, nullptr });
    }
    const char * open[] = { "<think>", "[THINK]" }, * close[] = { "</think>" }, * tool[] = { "<tool>" };
    const char * texts[] = { "", "<", "<thi", "nk>", "</think>", "<think></think><tool>", "plain \xc3\xa4", "[THINK]" };

    context c(m, 5, 3);
    const auto plain = c.run();
    for (int round = 0; round < 60; ++round) {
        std::vector<llama_steer_plan_term> terms;
        for (int i = pick(6); i >= 0; --i) {
            llama_steer_plan_term t = {};
            t.vector   = &vectors[pick(40)];
            t.name     = t.vector->key;
            t.strength = 0.1*(pick(40) - 15); // some out of range for project
            t.op       = pick(4);
            t.il_first = t.il_last = t.stream = -1;
            t.scope    = pick(7);
            t.first    = pick(8);
            t.last     = pick(3) ? -1 : pick(12);
            t.schedule = pick(3);
            t.over     = pick(6)*30;
            t.floor    = 0.25*pick(6);
            terms.push_back(t);
        }
        llama_steer_tags tags = {};
        tags.known = pick(5) > 0;
        tags.all_tools = pick(8) == 0;
        tags.generation_prompt = pick(2) ? texts[pick(8)] : nullptr;
        tags.prompt_end = pick(2) ? texts[pick(8)] : nullptr;
        tags.open = open;             tags.n_open = pick(3);
        tags.close = close;           tags.n_close = pick(2);
        tags.tool_open = tool;        tags.n_tool_open = pick(2);
        const int32_t n_prompt = pick(5);
        auto * plan = llama_steer_plan_new((int32_t) terms.size(), terms.data(), n_prompt, pick(8) ? &tags : nullptr);
        if (!plan) {
            CHECK(strlen(llama_steer_plan_error()) > 10);
            continue;
        }
        for (int32_t p = n_prompt + 1; p < 12; ++p) {
            const char * text = texts[pick(8)];
            CHECK(llama_steer_plan_feed(plan, p, text, (int32_t) strlen(text)) >= 0);
        }
        if (pick(3) == 0) {
            (void) llama_steer_plan_change(plan, 0, (int32_t) terms.size()/2, terms.data());
        }
        const llama_seq_id seq = pick(3);
        llama_pos pos[12];
        uint64_t ids[12];
        for (int32_t p = 0; p < 12; ++p) {
            pos[p] = p;
        }
        const int32_t planned = llama_steer_plan_edits(c, plan, 12, pos, ids);
        const int32_t applied = llama_steer_plan_apply(c, plan, seq, 0);
        if (applied == LLAMA_STEER_OK) { // renorm beside another op, and scales that are too large, are found here
            CHECK(planned == LLAMA_STEER_OK);
            for (int32_t p = 0; p < 12; ++p) {
                CHECK(llama_steer_edit_id(c, seq, p) == ids[p]);
            }
            c.forget();
            CHECK(c.decode(0, 12, seq) == 0);
            CHECK(llama_steer_seq_error(c, -1) == LLAMA_STEER_OK);
        } else {
            CHECK(applied == LLAMA_STEER_ERR_ARG);
        }
        if (pick(2)) {
            OK(c, llama_steer_seq_clear(c, pick(2) ? seq : -1));
        }
        llama_steer_plan_free(plan);
    }
    int32_t id = -1;
    OK(c, llama_steer_vector_pin(c, &vectors[3], LLAMA_STEER_PROJECT, &id));
    OK(c, llama_steer_vector_unpin(c, id));
    CHECK(llama_steer_vector_unpin(c, id) == LLAMA_STEER_ERR_ARG);
    CHECK(llama_steer_plan_apply(c, nullptr, 0, 0) == LLAMA_STEER_ERR_ARG);
    CHECK(llama_steer_vector_pin(c, nullptr, 0, &id) == LLAMA_STEER_ERR_ARG);
    OK(c, llama_steer_seq_clear(c, -1));
    CHECK(distance(c.run(), plain) == 0.0f);
    llama_steer_plan_free(nullptr);
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    auto params = llama_model_default_params();
    params.n_gpu_layers = 0;
    model_holder m;
    m.model = llama_model_load_from_file(argv[1], params);
    CHECK(m.model);
    CHECK(std::string(llama_steer_version()) == "llama-steer " + std::to_string(LLAMA_STEER_API_VERSION));
    CHECK(llama_steer_model_info(m.model, &m.info) == LLAMA_STEER_OK);
    m.n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(m.model));

    const std::vector<std::pair<const char *, void (*)(const model_holder &)>> tests = {
        { "formula",       test_formula },
        { "columns",       test_columns },
        { "many",          test_many },
        { "captures",      test_captures },
        { "callbacks",     test_callbacks },
        { "bad arguments", test_bad_arguments },
        { "lifetimes",     test_lifetimes },
        { "plans",         test_plans },
    };
    for (const auto & [name, test] : tests) {
        const auto start = std::chrono::steady_clock::now();
        test(m);
        fprintf(stderr, "%-14s %6.1f s\n", name, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    llama_model_free(m.model);
    llama_backend_free();
    printf("OK, %d checks\n", n_checks);
    return 0;
}
