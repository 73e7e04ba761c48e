// llama-steer.cpp - see llama-steer.h for what it does and README.md for how it is hooked in.

#include "llama-steer-impl.h"

#include "ggml-backend.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

// ---------------------------------------------------------------------------------------------------------------------
// what may be steered
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// The token axis cannot be guessed from a shape, so each architecture is listed with its own, and only after a test.
struct arch_rule {
    llm_arch arch;
    bool     streams;             // resid_post is [n_embd, streams, n_tokens]; otherwise [n_embd, n_tokens]
    bool     last_layer_outputs;  // the output rows are gathered inside the last block
    bool     writer_sites;        // attn_out and ffn_out are hooked
};

const arch_rule ARCH_RULES[] = {
    { LLM_ARCH_LLAMA,     false, true,  false },
    { LLM_ARCH_QWEN2,     false, true,  false },
    { LLM_ARCH_QWEN3,     false, true,  false },
    { LLM_ARCH_GEMMA3,    false, true,  false },
    { LLM_ARCH_DEEPSEEK2, false, true,  false },
    { LLM_ARCH_DEEPSEEK4, true,  false, true  },
};

const arch_rule * rule_for(llm_arch arch) {
    for (const auto & rule : ARCH_RULES) {
        if (rule.arch == arch) {
            return &rule;
        }
    }
    return nullptr;
}

const char * site_name(int site) {
    switch (site) {
        case LLAMA_STEER_RESID_POST: return "resid_post";
        case LLAMA_STEER_ATTN_OUT:   return "attn_out";
        case LLAMA_STEER_FFN_OUT:    return "ffn_out";
        default:                     return "unknown site";
    }
}

struct steer_error : std::runtime_error {
    steer_error(int32_t code, const std::string & what) : std::runtime_error(what), code(code) {}
    int32_t code;
};

using place = std::pair<int32_t, int32_t>; // (layer, site)

uint64_t mix64(uint64_t x) { // finaliser of splitmix64
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

uint64_t hash_bytes(const void * data, size_t size, uint64_t seed) {
    const uint8_t * p = static_cast<const uint8_t *>(data);
    uint64_t h = mix64(seed ^ size);
    for (; size >= 8; p += 8, size -= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        h = mix64(h ^ w);
    }
    if (size > 0) {
        uint64_t w = 0;
        memcpy(&w, p, size);
        h = mix64(h ^ w);
    }
    return h;
}

uint64_t hash_double(double x, uint64_t seed) {
    const double v = x == 0.0 ? 0.0 : x; // -0 and 0 are the same edit
    return hash_bytes(&v, sizeof(v), seed);
}

// position -> value, piecewise constant; positions below the first key have the default value
template <typename T>
struct interval_map {
    std::map<llama_pos, T> starts;

    T at(llama_pos p) const {
        auto it = starts.upper_bound(p);
        return it == starts.begin() ? T() : std::prev(it)->second;
    }

    void set(llama_pos p0, llama_pos p1, T value) {
        const bool open = p1 < 0;
        const T after = open ? T() : at(p1);
        auto first = starts.lower_bound(p0);
        auto last  = open ? starts.end() : starts.lower_bound(p1);
        starts.erase(first, last);
        starts[p0] = value;
        if (!open && starts.find(p1) == starts.end()) {
            starts[p1] = after;
        }
    }
};

struct direction {
    std::vector<float> v;     // [n_embd], unit
    double             scale; // dose at strength 1
    uint64_t           hash;  // of v
};

struct column {
    std::map<place, direction> dirs;
    int32_t dyn = -1;         // its index among the columns that project or clamp
};

struct config {
    std::vector<llama_steer_term> terms;
    uint64_t id = 0;
};

// Slots of one buffer type and one row layout: they share tensors and inputs, and one gather can serve them all.
struct group {
    ggml_backend_buffer_type_t buft = nullptr;
    int32_t n_streams = 1;
    bool    last      = false; // the slot may hold output rows only

    std::vector<int32_t> slots;

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor * sum = nullptr; // [n_embd, rows, n_slots]: sum of c*v for each distinct combination; row 0 is zero

    ggml_context_ptr        ctx_dyn;
    ggml_backend_buffer_ptr buf_dyn;
    ggml_tensor * v  = nullptr;  // [n_embd, n_dyn, n_slots]
    ggml_tensor * vt = nullptr;  // [n_dyn, n_embd, n_slots]
};

struct slot {
    place   at;
    int32_t group = 0;
    int32_t index = 0; // in the group
};

struct tap {
    place   at;
    int32_t n_streams = 1;  // streams of the node
    int32_t n_out     = 1;  // rows kept for a token
    bool    last      = false;

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor * rows = nullptr; // [n_embd, (n_rows + 1)*n_out]; the last n_out rows are scratch, for tokens that are not wanted

    std::vector<float> kept;
};

// one distinct (config, callback values, stream) combination, resident on the device as a row of group::sum
struct row_info {
    std::string        key;
    uint64_t           used = 0;     // ubatch that used it last
    bool               zero = true;  // nothing to apply: row 0 stands for it
    std::vector<float> g;            // [n_slots][n_dyn]
    std::vector<bool>  active;       // [n_slots]
};

enum mode_bits { MODE_EDIT = 1, MODE_TAP = 2, MODE_ALL = 3 };

} // namespace

struct llama_steer_state {
    llama_context     & ctx;
    const llama_model & model;
    arch_rule           rule;
    int32_t n_embd    = 0;
    int32_t n_layer   = 0;
    int32_t n_streams = 1;

    std::map<int32_t, column>                       columns;
    std::map<int32_t, config>                       configs;
    std::map<llama_seq_id, interval_map<int32_t>>   ranges;
    std::map<llama_seq_id, interval_map<bool>>      wanted;

    // device side
    std::vector<slot>        slots;
    std::map<place, int32_t> slot_of;
    std::vector<group>       groups;
    int32_t                  n_dyn = 0;      // capacity of the projecting columns
    std::vector<int32_t>     dyn_cols;       // dyn index -> column, -1 free
    int32_t                  n_rows = 0;     // capacity, row 0 included
    std::vector<row_info>    rows;
    std::unordered_map<std::string, int32_t> row_of;

    std::vector<tap> taps;
    int32_t tap_stream = LLAMA_STEER_STREAM_MEAN;
    int32_t tap_rows   = 0;
    bool    tap_keep   = true;
    std::vector<std::pair<llama_seq_id, llama_pos>> kept_at;

    llama_steer_read_callback read_cb = nullptr; void * read_cb_data = nullptr;
    llama_steer_add_callback  add_cb  = nullptr; void * add_cb_data  = nullptr;

    uint64_t generation = 1; // of the device side: a graph that was built for another one cannot be reused

    // the ubatch that is being computed
    int      mode     = MODE_ALL; // what the next graph must carry; reserve passes must see everything
    bool     live     = false;
    uint32_t n_tokens = 0;
    std::vector<int32_t> row_idx;              // [n_tokens][n_streams]
    std::vector<int32_t> tap_idx;              // [n_tokens], -1 not wanted
    std::vector<llama_seq_id> ub_seq;
    std::vector<llama_pos>    ub_pos;
    std::vector<std::pair<llama_seq_id, llama_pos>> tap_at;

    std::map<place, int64_t> fired;
    llama_steer_stats stats = {};
    std::string error = "no error";

    llama_steer_state(llama_context & ctx, const arch_rule & rule) : ctx(ctx), model(ctx.get_model()), rule(rule) {
        n_embd    = (int32_t) model.hparams.n_embd;
        n_layer   = (int32_t) model.hparams.n_layer();
        n_streams = rule.streams ? (int32_t) model.hparams.dsv4_hc_mult : 1;
    }

    int32_t streams_at(int32_t site) const { return site == LLAMA_STEER_RESID_POST ? n_streams : 1; }
    bool    is_last(const place & at) const { return rule.last_layer_outputs && at.first == n_layer - 1; }

    bool site_ok(int32_t site) const {
        return site == LLAMA_STEER_RESID_POST ||
            (rule.writer_sites && (site == LLAMA_STEER_ATTN_OUT || site == LLAMA_STEER_FFN_OUT));
    }

    void check_place(int32_t il, int32_t site) const {
        if (site < 0 || site >= LLAMA_STEER_SITE_COUNT) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("site %d does not exist", site));
        }
        if (!site_ok(site)) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, format("site %s is not available in architecture '%s': use resid_post",
                        site_name(site), llm_arch_name(model.arch)));
        }
        if (il < 0 || il >= n_layer) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("layer %d is out of range: this model has layers 0 to %d", il, n_layer - 1));
        }
    }
};

llama_steer_cvec::llama_steer_cvec()  = default;
llama_steer_cvec::~llama_steer_cvec() = default;

std::shared_ptr<llama_adapter_cvec> llama_steer_make_cvec() {
    return std::make_shared<llama_steer_cvec>();
}

// the one door to llama_context's private members; declared a friend there
struct llama_steer_access {
    static llama_steer_cvec & cvec(llama_context & ctx) {
        return static_cast<llama_steer_cvec &>(*ctx.cvec);
    }

    static const llama_steer_cvec & cvec(const llama_context & ctx) {
        return static_cast<const llama_steer_cvec &>(*ctx.cvec);
    }

    // Reserve the compute buffers for the graph with everything on. Throws when there is not enough memory.
    static void reserve(llama_context & ctx) {
        ctx.sched_need_reserve = true;
        ctx.sched_reserve();
    }

    static void reserve_later(llama_context & ctx) {
        ctx.sched_need_reserve = true;
    }
};

namespace {

thread_local std::string error_without_context = "no error";

llama_steer_state * state_of(const llama_context * ctx) {
    return ctx ? llama_steer_access::cvec(*ctx).state.get() : nullptr;
}

// Create the state on first use. Throws when the context cannot be steered at all.
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

// Run the body of an API call: no exception crosses the C boundary.
template <typename F>
int32_t guarded(llama_context * ctx, F && body) {
    int32_t code = LLAMA_STEER_ERR_INTERNAL;
    std::string what;
    try {
        body();
        return LLAMA_STEER_OK;
    } catch (const steer_error & e) {
        code = e.code;
        what = e.what();
    } catch (const std::bad_alloc &) {
        code = LLAMA_STEER_ERR_MEMORY;
        what = "out of memory";
    } catch (const std::exception & e) {
        what = e.what();
    } catch (...) {
        what = "unknown error";
    }
    if (auto * st = state_of(ctx)) {
        st->error = what;
    }
    error_without_context = what;
    return code;
}

// ---- device side ----

ggml_context_ptr new_tensor_context(size_t n_tensors) {
    ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };
    ggml_context_ptr ctx { ggml_init(params) };
    if (!ctx) {
        throw std::bad_alloc();
    }
    return ctx;
}

ggml_backend_buffer_ptr allocate(ggml_context * ctx, ggml_backend_buffer_type_t buft, bool weights, const char * what) {
    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft) };
    if (!buf) {
        throw steer_error(LLAMA_STEER_ERR_MEMORY, format("not enough memory on %s for %s", ggml_backend_buft_name(buft), what));
    }
    // WEIGHTS keeps the scheduler from computing the edit on a neighbouring device
    ggml_backend_buffer_set_usage(buf.get(), weights ? GGML_BACKEND_BUFFER_USAGE_WEIGHTS : GGML_BACKEND_BUFFER_USAGE_ANY);
    ggml_backend_buffer_clear(buf.get(), 0);
    return buf;
}

void drop_rows(llama_steer_state & st) {
    st.row_of.clear();
    st.rows.assign(st.n_rows, {});
}

void allocate_sums(llama_steer_state & st, std::vector<group> & groups, int32_t n_rows) {
    for (auto & g : groups) {
        auto ctx = new_tensor_context(1);
        auto * sum = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, st.n_embd, n_rows, g.slots.size());
        ggml_set_name(sum, "steer_sum");
        auto buf = allocate(ctx.get(), g.buft, true, "steering directions");
        g.sum = sum;
        g.ctx = std::move(ctx);
        g.buf = std::move(buf);
    }
}

void upload_dyn(const llama_steer_state & st, const std::vector<group> & groups, const std::vector<slot> & slots, int32_t n_dyn, int32_t dyn, const column * col) {
    std::vector<float> v(st.n_embd);
    for (const auto & sl : slots) {
        const auto & g = groups[sl.group];
        std::fill(v.begin(), v.end(), 0.0f);
        if (col) {
            auto it = col->dirs.find(sl.at);
            if (it != col->dirs.end()) {
                v = it->second.v;
            }
        }
        ggml_backend_tensor_set(g.v, v.data(), sl.index*g.v->nb[2] + dyn*g.v->nb[1], v.size()*sizeof(float));
        // vt: one float of each of its n_embd rows; read back, change, write whole rows (this is rare and small)
        std::vector<float> t((size_t) n_dyn*st.n_embd);
        ggml_backend_tensor_get(g.vt, t.data(), sl.index*g.vt->nb[2], t.size()*sizeof(float));
        for (int32_t i = 0; i < st.n_embd; ++i) {
            t[(size_t) i*n_dyn + dyn] = v[i];
        }
        ggml_backend_tensor_set(g.vt, t.data(), sl.index*g.vt->nb[2], t.size()*sizeof(float));
    }
}

void allocate_dyn(const llama_steer_state & st, std::vector<group> & groups, const std::vector<slot> & slots, int32_t n_dyn,
        const std::vector<int32_t> & dyn_cols, const std::map<int32_t, column> & columns) {
    if (n_dyn == 0) {
        return;
    }
    for (auto & g : groups) {
        auto ctx = new_tensor_context(2);
        auto * v  = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, st.n_embd, n_dyn, g.slots.size());
        auto * vt = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_dyn, st.n_embd, g.slots.size());
        ggml_set_name(v,  "steer_v");
        ggml_set_name(vt, "steer_vt");
        auto buf = allocate(ctx.get(), g.buft, true, "projecting directions");
        g.v  = v;
        g.vt = vt;
        g.ctx_dyn = std::move(ctx);
        g.buf_dyn = std::move(buf);
    }
    for (int32_t d = 0; d < (int32_t) dyn_cols.size(); ++d) {
        auto it = columns.find(dyn_cols[d]);
        if (it != columns.end()) {
            upload_dyn(st, groups, slots, n_dyn, d, &it->second);
        }
    }
}

// Bring the device side to the given places, row capacity and projecting columns, reserve compute buffers for the new graph,
// and only then let go of the old side. On any failure the old side is in force again.
void rebuild_bank(llama_steer_state & st, const std::vector<place> & places, int32_t n_dyn, const std::vector<int32_t> & dyn_cols,
        const std::map<int32_t, column> & columns) {
    std::vector<slot>        slots;
    std::map<place, int32_t> slot_of;
    std::vector<group>       groups;

    for (const auto & at : places) {
        slot sl;
        sl.at = at;
        auto * buft = st.model.select_buft(at.first);
        const int32_t n_streams = st.streams_at(at.second);
        const bool    last      = st.is_last(at);
        int32_t gi = 0;
        while (gi < (int32_t) groups.size() &&
               !(groups[gi].buft == buft && groups[gi].n_streams == n_streams && groups[gi].last == last)) {
            gi++;
        }
        if (gi == (int32_t) groups.size()) {
            groups.emplace_back();
            groups.back().buft      = buft;
            groups.back().n_streams = n_streams;
            groups.back().last      = last;
        }
        sl.group = gi;
        sl.index = (int32_t) groups[gi].slots.size();
        groups[gi].slots.push_back((int32_t) slots.size());
        slot_of[at] = (int32_t) slots.size();
        slots.push_back(sl);
    }

    st.ctx.synchronize(); // an earlier decode may still be reading the old tensors

    const int32_t n_rows = std::max(st.n_rows, 8);
    allocate_sums(st, groups, n_rows);
    allocate_dyn(st, groups, slots, n_dyn, dyn_cols, columns);

    auto swap_all = [&]() {
        std::swap(st.slots,   slots);
        std::swap(st.slot_of, slot_of);
        std::swap(st.groups,  groups);
        st.generation++;
    };
    const int32_t n_rows_old = st.n_rows;
    const int32_t n_dyn_old  = st.n_dyn;

    swap_all();
    st.n_rows = n_rows;
    st.n_dyn  = n_dyn;
    drop_rows(st);
    try {
        st.mode = MODE_ALL;
        llama_steer_access::reserve(st.ctx);
        st.stats.n_reserves++;
    } catch (...) {
        swap_all();
        st.n_rows = n_rows_old;
        st.n_dyn  = n_dyn_old;
        drop_rows(st);
        llama_steer_access::reserve_later(st.ctx);
        throw steer_error(LLAMA_STEER_ERR_MEMORY, "not enough memory to compute with steering: use fewer layers, a smaller n_ubatch or a smaller context");
    }
}

std::vector<place> places_of(const llama_steer_state & st) {
    std::vector<place> res;
    for (const auto & sl : st.slots) {
        res.push_back(sl.at);
    }
    return res;
}

// More distinct combinations than rows: make room without touching the compute buffers, whose size does not depend on it.
void grow_rows(llama_steer_state & st, int32_t n_rows) {
    std::vector<group> groups;
    for (const auto & g : st.groups) {
        groups.emplace_back();
        groups.back().buft      = g.buft;
        groups.back().n_streams = g.n_streams;
        groups.back().last      = g.last;
        groups.back().slots     = g.slots;
    }
    allocate_sums(st, groups, n_rows);
    for (size_t i = 0; i < groups.size(); ++i) {
        // the old rows move over, so that rows this ubatch has already been given stay valid
        const auto * src = st.groups[i].sum;
        std::vector<float> tmp((size_t) st.n_embd*st.n_rows);
        for (int64_t s = 0; s < src->ne[2]; ++s) {
            ggml_backend_tensor_get(src, tmp.data(), s*src->nb[2], tmp.size()*sizeof(float));
            ggml_backend_tensor_set(groups[i].sum, tmp.data(), s*groups[i].sum->nb[2], tmp.size()*sizeof(float));
        }
    }
    for (size_t i = 0; i < groups.size(); ++i) {
        std::swap(st.groups[i].sum, groups[i].sum);
        std::swap(st.groups[i].ctx, groups[i].ctx);
        std::swap(st.groups[i].buf, groups[i].buf);
    }
    st.n_rows = n_rows;
    st.rows.resize(n_rows);
    st.generation++;
}

// ---- coefficients: the one place where strength, scale, window, op and stream become c and g ----

bool term_covers(const llama_steer_term & t, const place & at, int32_t stream) {
    return (t.il_first < 0 || at.first >= t.il_first) && (t.il_last < 0 || at.first <= t.il_last) &&
           (t.stream < 0 || stream < 0 || t.stream == stream);
}

// stream < 0: any
void term_coefficients(const llama_steer_term & t, const direction & d, double & c, double & g) {
    c = 0.0;
    g = 0.0;
    if (t.strength == 0.0) {
        return;
    }
    switch (t.op) {
        case LLAMA_STEER_ADD:     c = t.strength*d.scale;           break;
        case LLAMA_STEER_PROJECT: g = -t.strength;                  break;
        case LLAMA_STEER_CLAMP:   c = t.strength*d.scale; g = -1.0; break;
        default: break;
    }
}

uint64_t config_hash(const llama_steer_state & st, const std::vector<llama_steer_term> & terms) {
    // merged by direction content first: v - v is nothing, whatever the columns are called
    struct item { double c = 0.0; double g = 0.0; };
    std::map<std::array<uint64_t, 4>, item> items;
    for (const auto & t : terms) {
        auto it = st.columns.find(t.column);
        if (it == st.columns.end()) {
            continue;
        }
        for (const auto & [at, d] : it->second.dirs) {
            if (!term_covers(t, at, -1)) {
                continue;
            }
            double c, g;
            term_coefficients(t, d, c, g);
            auto & i = items[{ d.hash, (uint64_t) at.first, (uint64_t) at.second, (uint64_t) (t.stream + 1) }];
            i.c += c;
            i.g += g;
        }
    }
    uint64_t id = 0;
    for (const auto & [key, i] : items) {
        if (i.c != 0.0 || i.g != 0.0) {
            id += mix64(hash_double(i.g, hash_double(i.c, hash_bytes(key.data(), sizeof(key), 0x57ee9))));
        }
    }
    const bool any = std::any_of(items.begin(), items.end(), [](const auto & kv) { return kv.second.c != 0.0 || kv.second.g != 0.0; });
    return any && id == 0 ? 1 : id;
}

// Fill row r for (terms, callback values) at one stream (-1: all streams alike) and write it to the device.
void fill_row(llama_steer_state & st, int32_t r, const std::vector<llama_steer_term> & terms, int32_t stream,
        const float * cb_c, const float * cb_g, int32_t n_cb) {
    auto & row = st.rows[r];
    row.zero = true;
    row.g.assign(st.slots.size()*st.n_dyn, 0.0f);
    row.active.assign(st.slots.size(), false);

    std::vector<float> packed(st.slots.size()*(size_t) st.n_embd, 0.0f);
    std::vector<double> acc(st.n_embd);
    std::map<uint64_t, std::pair<double, const direction *>> sums;

    for (size_t s = 0; s < st.slots.size(); ++s) {
        const place & at = st.slots[s].at;
        sums.clear();
        auto take = [&](const column & col, const direction & d, double c, double g) {
            if (c != 0.0) {
                auto & e = sums[d.hash];
                e.first += c;
                e.second = &d;
            }
            if (g != 0.0) {
                row.g[s*st.n_dyn + col.dyn] += (float) g;
            }
        };
        for (const auto & t : terms) {
            const auto & col = st.columns.at(t.column);
            auto it = col.dirs.find(at);
            // a stream is a notion of resid_post only; other sites have one row for each token
            if (it == col.dirs.end() || !term_covers(t, at, stream)) {
                continue;
            }
            double c, g;
            term_coefficients(t, it->second, c, g);
            take(col, it->second, c, g);
        }
        for (int32_t k = 0; k < n_cb; ++k) {
            if (cb_c[k] == 0.0f && cb_g[k] == 0.0f) {
                continue;
            }
            const auto & col = st.columns.at(k);
            auto it = col.dirs.find(at);
            if (it != col.dirs.end()) {
                take(col, it->second, (double) cb_c[k]*it->second.scale, cb_g[k]);
            }
        }
        std::fill(acc.begin(), acc.end(), 0.0);
        bool any = false;
        for (const auto & [hash, e] : sums) {
            if (e.first == 0.0) {
                continue;
            }
            any = true;
            const float * v = e.second->v.data();
            for (int32_t i = 0; i < st.n_embd; ++i) {
                acc[i] += e.first*v[i];
            }
        }
        if (any) {
            float * dst = packed.data() + s*st.n_embd;
            for (int32_t i = 0; i < st.n_embd; ++i) {
                dst[i] = (float) acc[i];
            }
        }
        for (int32_t d = 0; d < st.n_dyn; ++d) {
            any = any || row.g[s*st.n_dyn + d] != 0.0f;
        }
        row.active[s] = any;
        row.zero      = row.zero && !any;
    }

    if (row.zero) {
        return; // row 0 is used instead
    }
    for (size_t s = 0; s < st.slots.size(); ++s) {
        auto * sum = st.groups[st.slots[s].group].sum;
        ggml_backend_tensor_set(sum, packed.data() + s*st.n_embd, st.slots[s].index*sum->nb[2] + r*sum->nb[1], st.n_embd*sizeof(float));
    }
    st.stats.n_row_uploads++;
}

// The row for a combination: resident, or put there in place of the one that was used longest ago.
int32_t row_for(llama_steer_state & st, int32_t cfg, int32_t stream, const float * cb_c, const float * cb_g, int32_t n_cb) {
    static const std::vector<llama_steer_term> no_terms;

    std::string key(8, '\0');
    memcpy(&key[0], &cfg,    4);
    memcpy(&key[4], &stream, 4);
    if (n_cb > 0) {
        key.append(reinterpret_cast<const char *>(cb_c), n_cb*sizeof(float));
        key.append(reinterpret_cast<const char *>(cb_g), n_cb*sizeof(float));
    }

    auto it = st.row_of.find(key);
    if (it == st.row_of.end()) {
        int32_t best = -1;
        for (int32_t r = 1; r < st.n_rows; ++r) {
            if (st.rows[r].key.empty()) {
                best = r;
                break;
            }
            if (st.rows[r].used != st.stats.n_ubatches && (best < 0 || st.rows[r].used < st.rows[best].used)) {
                best = r;
            }
        }
        if (best < 0) {
            best = st.n_rows;
            grow_rows(st, st.n_rows*2);
        }
        if (!st.rows[best].key.empty()) {
            st.row_of.erase(st.rows[best].key);
            st.rows[best].key.clear();
        }
        auto c = st.configs.find(cfg);
        fill_row(st, best, c == st.configs.end() ? no_terms : c->second.terms, stream, cb_c, cb_g, n_cb);
        st.rows[best].key = key;
        it = st.row_of.emplace(key, best).first;
    }
    auto & row = st.rows[it->second];
    row.used = st.stats.n_ubatches;
    return row.zero ? 0 : it->second;
}

// a config changed: its rows are no longer what they say
void forget_rows_of(llama_steer_state & st, int32_t cfg) {
    for (auto & row : st.rows) {
        if (row.key.size() >= 8 && memcmp(row.key.data(), &cfg, 4) == 0) {
            st.row_of.erase(row.key);
            row.key.clear();
            row.used = 0;
        }
    }
}

void drop_kept(llama_steer_state & st) {
    for (auto & tp : st.taps) {
        std::vector<float>().swap(tp.kept);
    }
    st.kept_at.clear();
}

void refresh_ids(llama_steer_state & st) {
    for (auto & [_, c] : st.configs) {
        c.id = config_hash(st, c.terms);
    }
}

bool in_use(const llama_steer_state & st, int32_t column) {
    for (const auto & [_, c] : st.configs) {
        for (const auto & t : c.terms) {
            if (t.column == column) {
                return true;
            }
        }
    }
    return false;
}

} // namespace

// ---------------------------------------------------------------------------------------------------------------------
// the graph
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// A gather that serves all slots of a group costs one node instead of one for each layer; above this it would cost memory.
constexpr size_t FUSE_MAX_BYTES = 8u << 20;

class input_steer : public llm_graph_input_i {
public:
    struct group_input {
        ggml_tensor * idx   = nullptr; // I32 [rows, n_slots]
        ggml_tensor * g     = nullptr; // F32 [n_dyn, rows, n_slots]
        ggml_tensor * fused = nullptr; // F32 [n_embd, rows, n_slots]
        bool outputs_only = false;
    };
    struct tap_input {
        ggml_tensor * idx = nullptr;   // I64 [rows]
        bool outputs_only = false;
        int32_t n_out = 1;
    };

    input_steer(llama_steer_state * st, int mode, uint32_t n_tokens, uint32_t n_outputs) :
        st(st), mode(mode), generation(st->generation), n_tokens(n_tokens), n_outputs(n_outputs),
        groups(st->groups.size()), taps(st->taps.size()) {}

    // the token behind each row of a node: all tokens, or the outputs in batch order (as llm_graph_input_out_ids has them)
    static std::vector<uint32_t> tokens_of(const llama_ubatch * ub, bool outputs_only, uint32_t n_outputs) {
        std::vector<uint32_t> res;
        for (uint32_t i = 0; i < ub->n_tokens; ++i) {
            if (!outputs_only || n_outputs == ub->n_tokens || ub->output[i]) {
                res.push_back(i);
            }
        }
        return res;
    }

    void set_input(const llama_ubatch * ub) override {
        const bool live = st->live && st->n_tokens == ub->n_tokens;
        for (size_t gi = 0; gi < groups.size(); ++gi) {
            const auto & in = groups[gi];
            if (!in.idx || !in.idx->buffer) {
                continue; // not part of this graph
            }
            const auto & gr = st->groups[gi];
            const auto toks = tokens_of(ub, in.outputs_only, n_outputs);
            const size_t n_rows  = toks.size()*gr.n_streams;
            const size_t n_slots = gr.slots.size();
            GGML_ASSERT((int64_t) n_rows == in.idx->ne[0]);

            idx.assign(n_rows*in.idx->ne[1], 0);
            if (live) {
                for (size_t t = 0; t < toks.size(); ++t) {
                    for (int32_t s = 0; s < gr.n_streams; ++s) {
                        idx[t*gr.n_streams + s] = st->row_idx[toks[t]*st->n_streams + s];
                    }
                }
                for (int64_t k = 1; k < in.idx->ne[1]; ++k) {
                    std::copy_n(idx.begin(), n_rows, idx.begin() + k*n_rows);
                }
            }
            ggml_backend_tensor_set(in.idx, idx.data(), 0, idx.size()*sizeof(int32_t));

            if (in.g && in.g->buffer) {
                const size_t n_dyn = st->n_dyn;
                g.assign(n_slots*n_rows*n_dyn, 0.0f);
                if (live) {
                    for (size_t k = 0; k < n_slots; ++k) {
                        for (size_t r = 0; r < n_rows; ++r) {
                            if (idx[r] != 0) {
                                std::copy_n(st->rows[idx[r]].g.begin() + gr.slots[k]*n_dyn, n_dyn, g.begin() + (k*n_rows + r)*n_dyn);
                            }
                        }
                    }
                }
                ggml_backend_tensor_set(in.g, g.data(), 0, g.size()*sizeof(float));
            }
            if (live) {
                for (int32_t k : gr.slots) {
                    if (!hooked.count(st->slots[k].at)) {
                        continue;
                    }
                    const bool any = std::any_of(idx.begin(), idx.begin() + n_rows, [&](int32_t r) { return r != 0 && st->rows[r].active[k]; });
                    st->fired[st->slots[k].at] += any ? 1 : 0;
                }
            }
        }
        for (const auto & in : taps) {
            if (!in.idx || !in.idx->buffer) {
                continue;
            }
            const auto toks = tokens_of(ub, in.outputs_only, n_outputs);
            GGML_ASSERT((int64_t) toks.size()*in.n_out == in.idx->ne[0]);
            rows.resize(toks.size()*in.n_out);
            for (size_t t = 0; t < toks.size(); ++t) {
                const int32_t at = live ? st->tap_idx[toks[t]] : -1;
                for (int32_t s = 0; s < in.n_out; ++s) {
                    rows[t*in.n_out + s] = (int64_t) (at < 0 ? st->tap_rows : at)*in.n_out + s;
                }
            }
            ggml_backend_tensor_set(in.idx, rows.data(), 0, rows.size()*sizeof(int64_t));
        }
    }

    bool can_reuse(const llm_graph_params & params) override {
        return st->mode == mode && (mode == 0 || st->generation == generation) &&
            params.ubatch.n_tokens == n_tokens && params.n_outputs == n_outputs;
    }

    llama_steer_state * st;
    const int      mode;
    const uint64_t generation;
    const uint32_t n_tokens;
    const uint32_t n_outputs;

    std::vector<group_input> groups;
    std::vector<tap_input>   taps;
    std::map<place, bool>    hooked; // places whose edit is in this graph

private:
    std::vector<int32_t> idx;
    std::vector<float>   g;
    std::vector<int64_t> rows;
};

input_steer * input_of(const llm_graph_context & graph, llama_steer_state * st) {
    for (auto & input : graph.res->inputs) {
        if (auto * in = dynamic_cast<input_steer *>(input.get())) {
            return in;
        }
    }
    // registered in the plain graph as well, with no tensors: it is what tells that graph to give way to a steered one
    auto in = std::make_unique<input_steer>(st, st->mode, graph.n_tokens, graph.n_outputs);
    if (st->live) {
        st->stats.n_graph_builds++;
        st->stats.n_graph_on += st->mode != 0;
    }
    return static_cast<input_steer *>(graph.res->add_input(std::move(in)));
}

// Does the node hold output tokens only? -1: it has a shape that this architecture should not have.
int rows_are_outputs(const llm_graph_context & graph, const ggml_tensor * cur, int token_axis, bool may_gather) {
    if (may_gather && cur->ne[token_axis] == graph.n_outputs) {
        return 1;
    }
    return cur->ne[token_axis] == graph.n_tokens ? 0 : -1;
}

ggml_tensor * build_edit(const llm_graph_context & graph, llama_steer_state * st, input_steer * in, ggml_tensor * cur, int32_t si, bool outputs_only) {
    ggml_context * ctx0 = graph.ctx0;

    const auto & sl = st->slots[si];
    const auto & gr = st->groups[sl.group];
    auto & gin = in->groups[sl.group];

    const int64_t n_embd  = cur->ne[0];
    const int64_t n_rows  = ggml_nrows(cur);
    const int64_t n_slots = (int64_t) gr.slots.size();
    // a lone slot needs no fusing, and the last layer of most models has rows of its own
    const bool fuse = n_slots > 1 && (size_t) (n_embd*n_rows*n_slots)*sizeof(float) <= FUSE_MAX_BYTES;

    if (!gin.idx) {
        gin.outputs_only = outputs_only;
        gin.idx = ggml_new_tensor_2d(ctx0, GGML_TYPE_I32, n_rows, fuse ? n_slots : 1);
        ggml_set_input(gin.idx);
        ggml_set_name(gin.idx, "steer_idx");
        if (st->n_dyn > 0) {
            gin.g = ggml_new_tensor_3d(ctx0, GGML_TYPE_F32, st->n_dyn, n_rows, n_slots);
            ggml_set_input(gin.g);
            ggml_set_name(gin.g, "steer_g");
        }
        if (fuse) {
            gin.fused = ggml_get_rows(ctx0, gr.sum, gin.idx);
            ggml_set_name(gin.fused, "steer_rows");
        }
    }

    ggml_tensor * h = ggml_is_contiguous(cur) ? cur : ggml_cont(ctx0, cur);
    h = ggml_reshape_2d(ctx0, h, n_embd, n_rows);

    ggml_tensor * delta;
    if (gin.fused) {
        delta = ggml_view_2d(ctx0, gin.fused, n_embd, n_rows, gin.fused->nb[1], sl.index*gin.fused->nb[2]);
    } else {
        ggml_tensor * sum = ggml_view_2d(ctx0, gr.sum, n_embd, gr.sum->ne[1], gr.sum->nb[1], sl.index*gr.sum->nb[2]);
        delta = ggml_get_rows(ctx0, sum, ggml_view_1d(ctx0, gin.idx, n_rows, 0));
    }

    ggml_tensor * out = ggml_add(ctx0, h, delta);
    if (st->n_dyn > 0) {
        ggml_tensor * v  = ggml_view_2d(ctx0, gr.v,  n_embd, st->n_dyn, gr.v->nb[1],  sl.index*gr.v->nb[2]);
        ggml_tensor * vt = ggml_view_2d(ctx0, gr.vt, st->n_dyn, n_embd, gr.vt->nb[1], sl.index*gr.vt->nb[2]);
        ggml_tensor * g  = ggml_view_2d(ctx0, gin.g, st->n_dyn, n_rows, gin.g->nb[1], sl.index*gin.g->nb[2]);

        ggml_tensor * t = ggml_mul_mat(ctx0, v, h);  // V^T h: [n_dyn, rows]
        ggml_prec_set_acc(t, GGML_PREC_F32);         // some back ends would round to TF32
        t = ggml_mul(ctx0, t, g);
        t = ggml_mul_mat(ctx0, vt, t);               // V (g o V^T h)
        ggml_prec_set_acc(t, GGML_PREC_F32);
        out = ggml_add(ctx0, out, t);
    }

    in->hooked[sl.at] = true;
    return ggml_reshape_4d(ctx0, out, cur->ne[0], cur->ne[1], cur->ne[2], cur->ne[3]);
}

void build_tap(const llm_graph_context & graph, llama_steer_state * st, input_steer * in, ggml_tensor * cur, size_t ti, bool outputs_only) {
    ggml_context * ctx0 = graph.ctx0;

    auto & tp  = st->taps[ti];
    auto & tin = in->taps[ti];

    ggml_tensor * src;
    if (tp.n_streams > tp.n_out) { // mean over the streams
        src = ggml_view_2d(ctx0, cur, cur->ne[0], cur->ne[2], cur->nb[2], 0);
        for (int32_t s = 1; s < tp.n_streams; ++s) {
            src = ggml_add(ctx0, src, ggml_view_2d(ctx0, cur, cur->ne[0], cur->ne[2], cur->nb[2], s*cur->nb[1]));
        }
        src = ggml_scale(ctx0, src, 1.0f/tp.n_streams);
    } else {
        src = ggml_is_contiguous(cur) ? cur : ggml_cont(ctx0, cur);
        src = ggml_reshape_2d(ctx0, src, cur->ne[0], ggml_nrows(cur));
    }

    tin.outputs_only = outputs_only;
    tin.n_out        = tp.n_out;
    // taps with the same rows share their index
    for (size_t k = 0; k < in->taps.size(); ++k) {
        const auto & other = in->taps[k];
        if (k != ti && other.idx && other.outputs_only == outputs_only && other.n_out == tp.n_out) {
            tin.idx = other.idx;
            break;
        }
    }
    if (!tin.idx) {
        tin.idx = ggml_new_tensor_1d(ctx0, GGML_TYPE_I64, src->ne[1]);
        ggml_set_input(tin.idx);
        ggml_set_name(tin.idx, "steer_tap_idx");
    }
    ggml_build_forward_expand(graph.gf, ggml_set_rows(ctx0, tp.rows, src, tin.idx));
}

} // namespace

ggml_tensor * llama_steer_build(const llm_graph_context & graph, ggml_tensor * cur, int il, llama_steer_site site) {
    auto * st = static_cast<const llama_steer_cvec *>(graph.cvec)->state.get();
    if (!st || il < 0 || il >= st->n_layer) { // MTP blocks count on from n_layer
        return cur;
    }
    auto * in = input_of(graph, st);
    if (in->mode == 0) {
        return cur;
    }

    const place at(il, site);
    const int token_axis = st->streams_at(site) > 1 ? 2 : 1;

    const auto slot_it = st->slot_of.find(at);
    size_t ti = 0;
    while (ti < st->taps.size() && st->taps[ti].at != at) {
        ti++;
    }
    const bool edit = (in->mode & MODE_EDIT) && slot_it != st->slot_of.end();
    const bool read = (in->mode & MODE_TAP)  && ti < st->taps.size();
    if (!edit && !read) {
        return cur;
    }

    const int gathered = rows_are_outputs(graph, cur, token_axis, st->is_last(at));
    if (gathered < 0 || cur->type != GGML_TYPE_F32 || cur->ne[0] != st->n_embd) {
        return cur; // the place then never counts as fired, which the caller's probe reports
    }
    if (edit) {
        cur = build_edit(graph, st, in, cur, slot_it->second, gathered == 1);
    }
    if (read) {
        build_tap(graph, st, in, cur, ti, gathered == 1);
    }
    return cur;
}

uint32_t llama_steer_max_nodes(const llama_adapter_cvec & cvec) {
    const auto * st = static_cast<const llama_steer_cvec &>(cvec).state.get();
    return st ? 16u*(uint32_t) st->slots.size() + (8u + 2u*st->n_streams)*(uint32_t) st->taps.size() + 16u : 0u;
}

// ---------------------------------------------------------------------------------------------------------------------
// one ubatch
// ---------------------------------------------------------------------------------------------------------------------

namespace {

void begin_ubatch(llama_steer_state & st, const llama_ubatch & ub, uint32_t n_outputs) {
    const uint32_t n = ub.n_tokens;
    st.stats.n_ubatches++;
    st.n_tokens = n;
    st.ub_seq.resize(n);
    st.ub_pos.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
        st.ub_seq[i] = ub.seq_id[i][0];
        st.ub_pos[i] = ub.pos[i];
    }

    const int32_t n_cb_all = st.columns.empty() ? 0 : st.columns.rbegin()->first + 1;
    std::vector<float> cb_c;
    std::vector<float> cb_g;
    if (st.add_cb && n_cb_all > 0) {
        cb_c.assign((size_t) n*n_cb_all, 0.0f);
        cb_g.assign((size_t) n*n_cb_all, 0.0f);
        llama_steer_tokens tokens = { (int32_t) n, n_cb_all, st.ub_seq.data(), st.ub_pos.data() };
        if (!st.add_cb(&tokens, cb_c.data(), cb_g.data(), st.add_cb_data)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the add callback stopped this decode");
        }
        for (size_t i = 0; i < cb_c.size(); ++i) {
            const int32_t k = (int32_t) (i % n_cb_all);
            if (!std::isfinite(cb_c[i]) || !std::isfinite(cb_g[i])) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave column %d a coefficient that is not finite", k));
            }
            if (cb_c[i] == 0.0f && cb_g[i] == 0.0f) {
                continue;
            }
            auto it = st.columns.find(k);
            if (it == st.columns.end()) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave a coefficient to column %d, which is not set", k));
            }
            if (cb_g[i] != 0.0f && it->second.dyn < 0) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the add callback gave g to column %d, which no config projects or clamps", k));
            }
        }
    }

    auto config_of = [&](llama_seq_id seq, llama_pos pos) {
        auto it = st.ranges.find(seq);
        return it == st.ranges.end() ? 0 : it->second.at(pos);
    };
    auto wants = [&](llama_seq_id seq, llama_pos pos) {
        auto it = st.wanted.find(seq);
        return it != st.wanted.end() && it->second.at(pos);
    };

    // rows are written before the graph runs: no earlier compute may still read them
    bool synced = false;
    st.row_idx.assign((size_t) n*st.n_streams, 0);
    st.tap_idx.assign(n, -1);
    st.tap_at.clear();
    bool any_edit = false;
    for (uint32_t i = 0; i < n; ++i) {
        const int32_t cfg = config_of(st.ub_seq[i], st.ub_pos[i]);
        const bool   want = !st.taps.empty() && wants(st.ub_seq[i], st.ub_pos[i]);
        for (int32_t s = 1; s < ub.n_seq_id[i]; ++s) {
            const int32_t other = config_of(ub.seq_id[i][s], st.ub_pos[i]);
            const auto id = [&](int32_t c) { auto it = st.configs.find(c); return it == st.configs.end() ? 0 : it->second.id; };
            if (other != cfg && id(other) != id(cfg)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("sequences %d and %d share the token at position %d but not its steering",
                            st.ub_seq[i], ub.seq_id[i][s], st.ub_pos[i]));
            }
        }

        const float * c = nullptr;
        const float * g = nullptr;
        int32_t n_cb = 0;
        if (!cb_c.empty()) {
            c = cb_c.data() + (size_t) i*n_cb_all;
            g = cb_g.data() + (size_t) i*n_cb_all;
            for (int32_t k = 0; k < n_cb_all; ++k) {
                n_cb = c[k] != 0.0f || g[k] != 0.0f ? k + 1 : n_cb;
            }
        }
        auto it = st.configs.find(cfg);
        const bool none = it == st.configs.end() || it->second.id == 0;
        if ((!none || n_cb > 0) && !st.slots.empty()) {
            if (!synced) {
                ggml_backend_sched_synchronize(st.ctx.get_sched());
                synced = true;
            }
            const bool by_stream = it != st.configs.end() && std::any_of(it->second.terms.begin(), it->second.terms.end(),
                    [](const llama_steer_term & t) { return t.stream >= 0; });
            for (int32_t s = 0; s < st.n_streams; ++s) {
                const int32_t r = by_stream || s == 0 ? row_for(st, cfg, by_stream ? s : -1, c, g, n_cb) : st.row_idx[(size_t) i*st.n_streams];
                st.row_idx[(size_t) i*st.n_streams + s] = r;
                any_edit = any_edit || r != 0;
            }
        }

        if (want) {
            if ((int32_t) st.tap_at.size() >= st.tap_rows) {
                throw steer_error(LLAMA_STEER_ERR_LIMIT, format("more than %d tokens of one ubatch are to be read: give the taps more rows", st.tap_rows));
            }
            for (const auto & tp : st.taps) {
                if (tp.last && n_outputs != n && !ub.output[i]) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("layer %d holds output tokens only: position %d of sequence %d is no output and cannot be read there",
                                tp.at.first, st.ub_pos[i], st.ub_seq[i]));
                }
            }
            st.tap_idx[i] = (int32_t) st.tap_at.size();
            st.tap_at.emplace_back(st.ub_seq[i], st.ub_pos[i]);
        }
    }

    st.mode = (any_edit ? MODE_EDIT : 0) | (st.tap_at.empty() ? 0 : MODE_TAP);
    st.live = true;
}

void finish_ubatch(llama_steer_state & st) {
    if (st.tap_at.empty()) {
        return;
    }
    ggml_backend_sched_synchronize(st.ctx.get_sched());

    const size_t n = st.tap_at.size();
    std::vector<float> data;
    std::vector<llama_seq_id> seq;
    std::vector<llama_pos>    pos;
    for (const auto & [s, p] : st.tap_at) {
        seq.push_back(s);
        pos.push_back(p);
    }
    if (st.tap_keep) {
        for (auto & tp : st.taps) { // all or nothing: no tap may end up with more rows than another
            tp.kept.reserve(tp.kept.size() + n*tp.n_out*st.n_embd);
        }
        st.kept_at.reserve(st.kept_at.size() + n);
    }
    for (auto & tp : st.taps) {
        const size_t n_floats = n*tp.n_out*st.n_embd;
        data.resize(n_floats);
        ggml_backend_tensor_get(tp.rows, data.data(), 0, n_floats*sizeof(float));
        if (st.tap_keep) {
            tp.kept.insert(tp.kept.end(), data.begin(), data.end());
        }
        if (st.read_cb) {
            llama_steer_rows rows = { tp.at.first, tp.at.second, (int32_t) n, tp.n_out, st.n_embd, seq.data(), pos.data(), data.data() };
            if (!st.read_cb(&rows, st.read_cb_data)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, "the read callback stopped this decode");
            }
        }
    }
    if (st.tap_keep) {
        st.kept_at.insert(st.kept_at.end(), st.tap_at.begin(), st.tap_at.end());
    }
}

} // namespace

llama_steer_ubatch::llama_steer_ubatch(llama_context & ctx, const llama_ubatch & ubatch, uint32_t n_outputs) : ctx(ctx) {
    state = llama_steer_access::cvec(ctx).state.get();
    if (!state) {
        return;
    }
    ok = guarded(&ctx, [&]() { begin_ubatch(*state, ubatch, n_outputs); }) == LLAMA_STEER_OK;
    if (!ok) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, state->error.c_str());
    }
}

llama_steer_ubatch::~llama_steer_ubatch() {
    if (state) {
        state->live = false;
        state->mode = MODE_ALL;
    }
}

bool llama_steer_ubatch::finish() {
    if (!state) {
        return true;
    }
    const bool res = guarded(&ctx, [&]() { finish_ubatch(*state); }) == LLAMA_STEER_OK;
    if (!res) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, state->error.c_str());
    }
    return res;
}

// ---------------------------------------------------------------------------------------------------------------------
// C API
// ---------------------------------------------------------------------------------------------------------------------

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

int32_t llama_steer_column_set(llama_context * ctx, int32_t column_id, int32_t n, const int32_t * layers, const int32_t * sites,
        const float * dirs, const double * scales) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (column_id < 0 || column_id >= LLAMA_STEER_MAX_COLS) {
            throw steer_error(LLAMA_STEER_ERR_LIMIT, format("column %d is out of range: 0 to %d", column_id, LLAMA_STEER_MAX_COLS - 1));
        }
        if (n <= 0 || n > st.n_layer*LLAMA_STEER_SITE_COUNT || !layers || !sites || !dirs || !scales) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("column %d needs 1 to %d directions with layers, sites and scales", column_id, st.n_layer*LLAMA_STEER_SITE_COUNT));
        }
        column col;
        for (int32_t i = 0; i < n; ++i) {
            st.check_place(layers[i], sites[i]);
            if (!std::isfinite(scales[i])) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the scale of column %d at layer %d is not finite", column_id, layers[i]));
            }
            const float * v = dirs + (size_t) i*st.n_embd;
            double sq = 0.0;
            for (int32_t j = 0; j < st.n_embd; ++j) {
                sq += (double) v[j]*v[j];
            }
            if (!std::isfinite(sq)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the direction of column %d at layer %d holds NaN or Inf", column_id, layers[i]));
            }
            if (std::fabs(std::sqrt(sq) - 1.0) > 1e-3) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the direction of column %d at layer %d has norm %g instead of 1", column_id, layers[i], std::sqrt(sq)));
            }
            direction d;
            d.v.assign(v, v + st.n_embd);
            d.scale = scales[i];
            d.hash  = hash_bytes(v, st.n_embd*sizeof(float), 1);
            if (!col.dirs.emplace(place(layers[i], sites[i]), std::move(d)).second) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("column %d has two directions at layer %d, %s", column_id, layers[i], site_name(sites[i])));
            }
        }
        auto old = st.columns.find(column_id);
        if (old != st.columns.end()) {
            col.dyn = old->second.dyn;
            for (const auto & [_, c] : st.configs) {
                for (const auto & t : c.terms) {
                    if (t.column == column_id && std::none_of(col.dirs.begin(), col.dirs.end(), [&](const auto & d) { return term_covers(t, d.first, -1); })) {
                        throw steer_error(LLAMA_STEER_ERR_ARG, format("column %d is used by a config whose layer window holds none of its new layers", column_id));
                    }
                }
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
            auto columns = st.columns;
            columns[column_id] = col;
            rebuild_bank(st, places, st.n_dyn, st.dyn_cols, columns);
        } else {
            st.ctx.synchronize();
            if (col.dyn >= 0) {
                upload_dyn(st, st.groups, st.slots, st.n_dyn, col.dyn, &col);
            }
            drop_rows(st);
        }
        st.columns[column_id] = std::move(col);
        refresh_ids(st);
    });
}

int32_t llama_steer_column_clear(llama_context * ctx, int32_t column_id) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        auto it = st.columns.find(column_id);
        if (it == st.columns.end()) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("column %d is not set", column_id));
        }
        if (in_use(st, column_id)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("column %d is in use by a config", column_id));
        }
        st.ctx.synchronize();
        if (it->second.dyn >= 0) {
            upload_dyn(st, st.groups, st.slots, st.n_dyn, it->second.dyn, nullptr);
            st.dyn_cols[it->second.dyn] = -1;
        }
        drop_rows(st);
        st.columns.erase(it);
    });
}

int32_t llama_steer_config_set(llama_context * ctx, int32_t config_id, int32_t n_terms, const llama_steer_term * terms) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (config_id < 1) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("config %d cannot be set: ids start at 1, 0 is no steering", config_id));
        }
        if (n_terms < 0 || n_terms > LLAMA_STEER_MAX_TERMS || (n_terms > 0 && !terms)) {
            throw steer_error(LLAMA_STEER_ERR_LIMIT, format("a config takes 0 to %d terms, not %d", LLAMA_STEER_MAX_TERMS, n_terms));
        }
        std::vector<int32_t> promote; // columns that now need V on the device
        for (int32_t i = 0; i < n_terms; ++i) {
            const auto & t = terms[i];
            auto it = st.columns.find(t.column);
            if (it == st.columns.end()) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("column %d is not set", t.column));
            }
            if (t.op < LLAMA_STEER_ADD || t.op > LLAMA_STEER_CLAMP) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("op %d does not exist", t.op));
            }
            if (!std::isfinite(t.strength)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the strength of column %d is not finite", t.column));
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
                double c, g;
                term_coefficients(t, d, c, g);
                if (!std::isfinite((float) c) || !std::isfinite((float) g)) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("strength %g of column %d is too large", t.strength, t.column));
                }
            }
            if (!covers) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("the layer window %d-%d holds none of the layers of column %d", t.il_first, t.il_last, t.column));
            }
            if (t.op != LLAMA_STEER_ADD && it->second.dyn < 0 && std::find(promote.begin(), promote.end(), t.column) == promote.end()) {
                promote.push_back(t.column);
            }
        }

        if (!promote.empty()) {
            auto dyn_cols = st.dyn_cols;
            auto columns  = st.columns;
            for (int32_t k : promote) {
                auto free = std::find(dyn_cols.begin(), dyn_cols.end(), -1);
                if (free == dyn_cols.end()) {
                    // take the place of a column that projects no longer
                    for (auto it = dyn_cols.begin(); it != dyn_cols.end() && free == dyn_cols.end(); ++it) {
                        bool used = std::find(promote.begin(), promote.end(), *it) != promote.end();
                        for (const auto & [id, c] : st.configs) {
                            for (const auto & t : c.terms) {
                                used = used || (id != config_id && t.column == *it && t.op != LLAMA_STEER_ADD);
                            }
                        }
                        for (int32_t i = 0; i < n_terms; ++i) {
                            used = used || (terms[i].column == *it && terms[i].op != LLAMA_STEER_ADD);
                        }
                        if (!used && (int32_t) dyn_cols.size() >= LLAMA_STEER_MAX_DYN) {
                            columns.at(*it).dyn = -1;
                            free = it;
                        }
                    }
                }
                if (free == dyn_cols.end()) {
                    if ((int32_t) dyn_cols.size() >= LLAMA_STEER_MAX_DYN) {
                        throw steer_error(LLAMA_STEER_ERR_LIMIT, format("more than %d columns project or clamp at once", LLAMA_STEER_MAX_DYN));
                    }
                    dyn_cols.push_back(-1);
                    free = dyn_cols.end() - 1;
                }
                *free = k;
                columns.at(k).dyn = (int32_t) (free - dyn_cols.begin());
            }
            int32_t n_dyn = std::max(st.n_dyn, 4);
            while (n_dyn < (int32_t) dyn_cols.size()) {
                n_dyn *= 2;
            }
            if (n_dyn != st.n_dyn) {
                rebuild_bank(st, places_of(st), n_dyn, dyn_cols, columns);
            } else {
                st.ctx.synchronize();
                for (int32_t k : promote) {
                    upload_dyn(st, st.groups, st.slots, st.n_dyn, columns.at(k).dyn, &columns.at(k));
                }
                drop_rows(st);
            }
            st.dyn_cols = std::move(dyn_cols);
            st.columns  = std::move(columns);
        }

        auto & c = st.configs[config_id];
        c.terms.assign(terms, terms + n_terms);
        c.id = config_hash(st, c.terms);
        forget_rows_of(st, config_id);
    });
}

int32_t llama_steer_config_clear(llama_context * ctx, int32_t config_id) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (!st.configs.erase(config_id)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("config %d is not set", config_id));
        }
        forget_rows_of(st, config_id);
        for (auto & [_, r] : st.ranges) {
            for (auto & [p, id] : r.starts) {
                id = id == config_id ? 0 : id;
            }
        }
    });
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
        } else {
            st.ranges.erase(seq);
            st.wanted.erase(seq);
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

uint64_t llama_steer_edit_id(const llama_context * ctx, llama_seq_id seq, llama_pos pos) {
    const auto * st = state_of(ctx);
    if (!st) {
        return 0;
    }
    auto it = st->ranges.find(seq);
    return it == st->ranges.end() ? 0 : llama_steer_config_id(ctx, it->second.at(pos));
}

int32_t llama_steer_tap_set(llama_context * ctx, int32_t n, const int32_t * layers, const int32_t * sites, int32_t stream_mode, int32_t n_rows, bool keep) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        const int32_t n_ubatch = (int32_t) st.ctx.n_ubatch();
        if (n < 0 || n > st.n_layer*LLAMA_STEER_SITE_COUNT || (n > 0 && (!layers || !sites))) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("0 to %d taps can be set, not %d", st.n_layer*LLAMA_STEER_SITE_COUNT, n));
        }
        if (stream_mode != LLAMA_STEER_STREAM_MEAN && stream_mode != LLAMA_STEER_STREAM_ALL) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("stream mode %d does not exist: read the mean or all", stream_mode));
        }
        if (n_rows < 0) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("taps cannot hold %d rows", n_rows));
        }
        n_rows = n_rows == 0 ? n_ubatch : std::min(n_rows, n_ubatch);

        // asking for the same taps again is the usual case, and costs nothing
        bool same = n == (int32_t) st.taps.size() && n_rows <= st.tap_rows && stream_mode == st.tap_stream;
        for (int32_t i = 0; same && i < n; ++i) {
            same = st.taps[i].at == place(layers[i], sites[i]);
        }
        if (same) {
            st.tap_keep = keep;
            drop_kept(st);
            return;
        }

        std::vector<tap> taps;
        for (int32_t i = 0; i < n; ++i) {
            st.check_place(layers[i], sites[i]);
            tap tp;
            tp.at        = place(layers[i], sites[i]);
            tp.n_streams = st.streams_at(sites[i]);
            tp.n_out     = stream_mode == LLAMA_STEER_STREAM_ALL ? tp.n_streams : 1;
            tp.last      = st.is_last(tp.at);
            for (const auto & other : taps) {
                if (other.at == tp.at) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("layer %d, %s is tapped twice", layers[i], site_name(sites[i])));
                }
            }
            tp.ctx  = new_tensor_context(1);
            tp.rows = ggml_new_tensor_2d(tp.ctx.get(), GGML_TYPE_F32, st.n_embd, (int64_t) (n_rows + 1)*tp.n_out);
            ggml_set_name(tp.rows, "steer_tap");
            tp.buf  = allocate(tp.ctx.get(), st.model.select_buft(layers[i]), false, "rows to read");
            taps.push_back(std::move(tp));
        }

        st.ctx.synchronize();
        std::swap(st.taps, taps);
        const auto old_rows   = st.tap_rows;
        const auto old_stream = st.tap_stream;
        st.tap_rows   = n_rows;
        st.tap_stream = stream_mode;
        st.generation++;
        if (n > 0) { // taking taps away needs no memory
            try {
                st.mode = MODE_ALL;
                llama_steer_access::reserve(st.ctx);
                st.stats.n_reserves++;
            } catch (...) {
                std::swap(st.taps, taps);
                st.tap_rows   = old_rows;
                st.tap_stream = old_stream;
                st.generation++;
                llama_steer_access::reserve_later(st.ctx);
                throw steer_error(LLAMA_STEER_ERR_MEMORY, "not enough memory to compute with these taps: read fewer layers, or use a smaller n_ubatch");
            }
        }
        st.tap_keep = keep;
        st.kept_at.clear();
    });
}

int32_t llama_steer_tap_range(llama_context * ctx, llama_seq_id seq, llama_pos p0, llama_pos p1, bool wanted) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        if (seq < 0 || p0 < 0 || (p1 >= 0 && p1 <= p0)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("sequence %d, positions %d to %d is no range", seq, p0, p1));
        }
        st.wanted[seq].set(p0, p1, wanted);
    });
}

int32_t llama_steer_tap_count(const llama_context * ctx) {
    const auto * st = state_of(ctx);
    return st ? (int32_t) st->kept_at.size() : 0;
}

int32_t llama_steer_tap_index(const llama_context * ctx, llama_seq_id * seq, llama_pos * pos) {
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

int32_t llama_steer_tap_get(const llama_context * ctx, int32_t il, int32_t site, float * out, size_t n_floats) {
    return guarded(const_cast<llama_context *>(ctx), [&]() {
        const auto * st = state_of(ctx);
        if (st && out) {
            for (const auto & tp : st->taps) {
                if (tp.at == place(il, site)) {
                    if (n_floats < tp.kept.size()) {
                        throw steer_error(LLAMA_STEER_ERR_ARG, format("%zu floats were read at layer %d, there is room for %zu", tp.kept.size(), il, n_floats));
                    }
                    std::copy(tp.kept.begin(), tp.kept.end(), out);
                    return;
                }
            }
        }
        throw steer_error(LLAMA_STEER_ERR_ARG, format("layer %d, %s is not tapped", il, site_name(site)));
    });
}

int32_t llama_steer_tap_clear(llama_context * ctx) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        drop_kept(st);
    });
}

int32_t llama_steer_set_read_callback(llama_context * ctx, llama_steer_read_callback callback, void * user_data) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
        st.read_cb      = callback;
        st.read_cb_data = user_data;
    });
}

int32_t llama_steer_set_add_callback(llama_context * ctx, llama_steer_add_callback callback, void * user_data) {
    return guarded(ctx, [&]() {
        auto & st = state_for(ctx);
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
            for (const auto & tp : st->taps) {
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

int32_t llama_steer_free(llama_context * ctx) {
    return guarded(ctx, [&]() {
        if (!ctx) {
            throw steer_error(LLAMA_STEER_ERR_ARG, "the context is NULL");
        }
        ctx->synchronize();
        llama_steer_access::cvec(*ctx).state.reset();
        llama_steer_access::reserve_later(*ctx);
    });
}
