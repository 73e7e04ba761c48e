// llama-steer-state.h - the steering state of one context, shared by the llama-steer-*.cpp files and nobody else.
#pragma once

#include "ggml-backend.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"
#include "llama-steer-compat.h"
#include "llama-steer-impl.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace llama_steer {

constexpr int32_t MIN_ROWS = 8; // distinct sums on the device, row 0 included; what an idle context keeps
constexpr size_t MAX_ROWS = 1024;
constexpr size_t MIN_MAX_ROWS = 128; // however large a row is
constexpr size_t MAX_ROW_BYTES = (size_t) 512 << 20;

constexpr double MAX_STATE = 1e18; // its square is still far from the largest float32
constexpr double ANY_STATE = 1e6;  // longer than the states of models are

inline const char * site_name(int site) {
    switch (site) {
        case LLAMA_STEER_RESID_POST:
            return "resid_post";
        case LLAMA_STEER_ATTN_OUT:
            return "attn_out";
        case LLAMA_STEER_FFN_OUT:
            return "ffn_out";
        default:
            return "unknown site";
    }
}

struct steer_error : std::runtime_error {
    steer_error(int32_t code, const std::string & what)
        : std::runtime_error(what), code(code) {}
    int32_t code;
};

using place = std::pair<int32_t, int32_t>; // (layer, site)

inline uint64_t mix64(uint64_t x) { // finaliser of splitmix64
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

inline uint64_t hash_bytes(const void * data, size_t size, uint64_t seed) {
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

inline uint64_t hash_double(double x, uint64_t seed) {
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
        auto last = open ? starts.end() : starts.lower_bound(p1);
        starts.erase(first, last);
        starts[p0] = value;
        if (!open && starts.find(p1) == starts.end()) {
            starts[p1] = after;
        }
    }
};

constexpr double LINEAR = -std::numeric_limits<double>::infinity(); // the knee of a column that has none

// Reads the state along one row and writes along another: h += gain * phi(read.h + bias) * write.
struct column {
    std::vector<float> read;  // [n_embd], unit
    std::vector<float> write; // [n_embd], unit
    double gain;              // at strength 1
    double bias;
    double knee; // phi(z) is z above it, and 0 elsewhere; LINEAR: z
    uint64_t hash;
};

struct direction {
    std::vector<float> v; // [n_embd], unit
    double scale;         // dose at strength 1
    uint64_t hash;        // of v
    std::vector<column> columns;
};

// What of a vector has a row of its own among those that read the state: one of its columns (0, 1, ...), or its direction.
enum part_id { PART_SELF = -1,  // reads and writes along it
               PART_FLOOR = -2, // reads against it
               PART_CAP = -3 };

using part_key = std::pair<int32_t, int32_t>; // (vector, part)

struct steer_vector {
    std::map<place, direction> dirs;
    std::map<int32_t, int32_t> dyn; // part -> its index among all that read the state
};

// What a term does with one part of a direction: h += g * phi(read.h + bias) * write.
struct part_edit {
    int32_t part;
    double g;
    double bias;
    double knee;
    const column * col; // null: the direction itself
    uint64_t hash;      // of all but g
};

using vectors_by_id = std::map<int32_t, steer_vector>;

constexpr part_key NO_PART = { -1, 0 };

struct config {
    std::vector<llama_steer_term> terms;
    uint64_t id = 0;

    bool by_stream() const {
        return std::any_of(terms.begin(), terms.end(), [](const llama_steer_term & t) { return t.stream >= 0; });
    }

    std::map<place, int64_t> fired; // ubatches in which it edited a place that it acts at
};

// A config in the ubatch that is being computed.
struct config_use {
    std::set<llama_seq_id> sequences;
    bool output = false; // of one of its tokens
};

// Slots of one buffer type and one row layout: they share tensors and inputs, and one gather can serve them all.
struct group {
    ggml_backend_buffer_type_t buft = nullptr;
    int32_t n_streams = 1;
    bool last = false; // the slot may hold output rows only

    std::vector<int32_t> slots;

    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor * sum = nullptr; // [n_embd, rows, n_slots]: sum of c*v for each distinct combination; row 0 is zero

    ggml_context_ptr ctx_dyn;
    ggml_backend_buffer_ptr buf_dyn;
    ggml_tensor * v = nullptr;  // [n_embd, n_dyn, n_slots]: what is read along
    ggml_tensor * vt = nullptr; // [n_dyn, n_embd, n_slots]: what is written along, as columns
};

struct slot {
    place at;
    int32_t group = 0;
    int32_t index = 0; // in the group
};

struct capture {
    place at;
    int32_t n_streams = 1; // streams of the node
    int32_t n_out = 1;     // rows kept for a token
    bool last = false;

    ggml_context_ptr ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor * rows = nullptr; // [n_embd, (n_rows + 1)*n_out]; the last n_out rows are scratch, for tokens that are not wanted

    std::vector<float> kept;
};

// one distinct (config, callback values, stream) combination, resident on the device as a row of group::sum
struct row_info {
    std::string key;
    uint64_t used = 0;          // ubatch that used it last
    bool zero = true;           // nothing to apply: row 0 stands for it
    std::vector<float> g;       // [3][n_slots][n_dyn]: coefficients, biases, and the knees with their signs turned
    std::vector<uint8_t> kinds; // [n_slots] kind_bits: what it does there
    int32_t config = 0;
};

// A vector or config that llama-steer-pool.cpp found a place for.
struct pooled {
    int32_t id;
    int32_t pins;  // by callbacks; ranges and configs are looked at where they are
    uint64_t last; // use
};

enum mode_bits { MODE_EDIT = 1,
                 MODE_CAPTURE = 2,
                 MODE_ALL = 3 };

enum kind_bits { KIND_ADD = 1,
                 KIND_DYN = 2,
                 KIND_RENORM = 4,
                 KIND_KNEE = 8 };  // some of what reads the state has a bias or a knee; with KIND_DYN only
constexpr uint64_t KIND_KEPT = 64; // edited ubatches for which a graph keeps doing what none of them needs

// What is known of a place in this model's graphs. Found out, not listed: see llama-steer-facts.cpp.
struct place_facts {
    int32_t n_streams = 1; // the node is [n_embd, n_streams, n_tokens]; with 1: [n_embd, n_tokens]
    bool gathered = false; // it holds output tokens only
    int32_t n_seen = 0;    // nodes that passed; more than one cannot be told apart
};

} // namespace llama_steer

using namespace llama_steer; // this header is private to three files

struct llama_steer_state {
    llama_context & ctx;
    const llama_model & model;
    std::map<place, place_facts> facts;
    bool probing = false; // facts are being found out
    int32_t n_embd = 0;
    int32_t n_layer = 0;
    int32_t n_streams = 1;

    vectors_by_id vectors;
    std::map<int32_t, config> configs;
    std::map<llama_seq_id, interval_map<int32_t>> ranges;
    std::map<llama_seq_id, interval_map<bool>> wanted;
    std::map<llama_seq_id, llama_pos> applied_from;                     // what lies before was computed
    std::map<llama_seq_id, std::pair<int32_t, std::string>> seq_errors; // what the caller has not been told yet

    struct {
        std::map<std::string, pooled> vectors; // by content
        std::map<std::string, pooled> configs; // by their terms, written out
        int32_t next_config = 0;
        uint64_t clock = 0;
    } pool;

    // device side
    std::vector<slot> slots;
    std::map<place, int32_t> slot_of;
    std::vector<group> groups;
    int32_t n_dyn = 0;              // capacity of what reads the state
    bool norms = false;             // graphs can restore lengths: a config has asked for it
    std::vector<part_key> dyn_cols; // dyn index -> what is there, NO_PART: free
    int32_t n_rows = 0;             // capacity, row 0 included
    std::vector<row_info> rows;
    std::unordered_map<std::string, int32_t> row_of;

    std::vector<capture> captures;
    int32_t capture_stream = LLAMA_STEER_STREAM_MEAN;
    int32_t capture_rows = 0;
    bool capture_keep = true;
    std::vector<std::pair<llama_seq_id, llama_pos>> kept_at;

    llama_steer_read_callback read_cb = nullptr;
    void * read_cb_data = nullptr;
    llama_steer_add_callback add_cb = nullptr;
    void * add_cb_data = nullptr;
    bool in_callback = false; // the graph and its buffers must stay as they are

    uint64_t generation = 1; // of the device side: a graph that was built for another one cannot be reused

    // the ubatch that is being computed
    int mode = MODE_ALL; // what the next graph must carry; reserve passes must see everything
    bool live = false;
    std::vector<uint8_t> kinds;                     // [n_slots] of the rows in use: what the graph has to do there
    std::vector<std::array<uint64_t, 4>> kind_used; // [n_slots][bit of kind_bits]: the edited ubatch that needed it last, 0 for none
    uint64_t n_edits = 0;                           // edited ubatches so far
    bool row_waited = false;
    bool capture_built = true; // every capture is in the graph
    uint32_t n_tokens = 0;
    std::vector<int32_t> row_idx;     // [n_tokens][n_streams]
    std::vector<int32_t> capture_idx; // [n_tokens], -1 not wanted
    std::vector<llama_seq_id> ub_seq;
    std::vector<llama_pos> ub_pos;
    std::vector<std::pair<llama_seq_id, llama_pos>> capture_at;

    std::map<int32_t, config_use> uses; // config -> what of the ubatch has it

    std::map<place, int64_t> fired;
    llama_steer_stats stats = {};
    std::string error = "no error";

    explicit llama_steer_state(llama_context & ctx)
        : ctx(ctx), model(ctx.get_model()) {
        n_embd = (int32_t) model.hparams.n_embd;
        n_layer = compat::n_layer(model.hparams, 0);
    }

    int32_t streams_at(const place & at) const { return facts.at(at).n_streams; }
    bool gathered(const place & at) const { return facts.at(at).gathered; } // only output tokens get there

    // Graphs of reserve passes have to hold everything.
    void want_all() {
        mode = MODE_ALL;
        kinds.assign(slots.size(), KIND_ADD | (n_dyn > 0 ? KIND_DYN | KIND_KNEE : 0) | (norms ? KIND_RENORM : 0));
    }

    // For one sequence; the others are computed as they should be.
    void seq_error(llama_seq_id seq, int32_t code, const std::string & what) {
        seq_errors.emplace(seq, std::make_pair(code, what));
    }

    void not_in_callback(const char * what) const {
        if (in_callback) {
            throw llama_steer::steer_error(LLAMA_STEER_ERR_ARG, format("%s cannot be done inside a callback: do it between two decodes", what));
        }
    }

    bool site_ok(int32_t site) const {
        return std::any_of(facts.begin(), facts.end(), [&](const auto & f) { return f.first.second == site; });
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
        if (!facts.count(place(il, site))) {
            throw steer_error(LLAMA_STEER_ERR_ARCH, format("layer %d of this model has no hook at %s: leave it out", il, site_name(site)));
        }
    }
};

// the one door to llama_context's private members; declared a friend there
struct llama_steer_access {
    static llama_steer_cvec & cvec(llama_context & ctx) {
        return static_cast<llama_steer_cvec &>(*ctx.cvec);
    }

    static const llama_steer_cvec & cvec(const llama_context & ctx) {
        return static_cast<const llama_steer_cvec &>(*ctx.cvec);
    }

    // Build a graph of at least n_tokens, of which at most n_outputs are outputs, and no more. The scheduler and the graphs before are as if new.
    static void build_once(llama_context & ctx, uint32_t n_tokens, uint32_t n_outputs) {
        auto memory = ctx.memory ? ctx.memory->init_full() : nullptr;
        const uint32_t n_seqs = ctx.n_seq_max(); // a cache with a buffer for each sequence knows graphs over all of them only
        const uint32_t n = (n_tokens + n_seqs - 1) / n_seqs * n_seqs;
        ctx.graph_reserve(n, n_seqs, std::min(n_outputs, n), memory.get(), /*split_only=*/true);
    }

    // Reserve the compute buffers for the graph with everything on. Throws when there is not enough memory.
    static void reserve(llama_context & ctx) {
        ctx.sched_need_reserve = true;
        ctx.sched_reserve();
    }

    // After a roll-back: what was enough before should be enough again, and must not fail in the middle of a decode instead.
    static void reserve_again(llama_context & ctx) {
        try {
            reserve(ctx);
        } catch (...) {
            reserve_later(ctx);
        }
    }

    static void reserve_later(llama_context & ctx) {
        ctx.sched_need_reserve = true;
    }
};

namespace llama_steer {

// llama-steer-facts.cpp

bool is_tested(llm_arch arch);
void find_facts(llama_steer_state & st);
void note_facts(llama_steer_state & st, const place & at, const ggml_tensor * cur, int64_t n_tokens, int64_t n_outputs);

llama_steer_state * state_of(const llama_context * ctx);

// Create the state on first use. Throws when the context cannot be steered at all.
llama_steer_state & state_for(llama_context * ctx);

// llama-steer-config.cpp

// room: there is a place on the device for each of its directions; else for those that a config uses.
void set_vector(llama_steer_state & st, int32_t vector_id, const llama_steer_vector & vector, bool room);
void clear_vector(llama_steer_state & st, int32_t vector_id);
void set_config(llama_steer_state & st, int32_t config_id, int32_t n_terms, const llama_steer_term * terms);
void clear_config(llama_steer_state & st, int32_t config_id);

void set_error(llama_context * ctx, const std::string & what);

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
    set_error(ctx, what);
    return code;
}

// llama-steer-bank.cpp

ggml_context_ptr new_tensor_context(size_t n_tensors);
ggml_backend_buffer_ptr allocate(ggml_context * ctx, ggml_backend_buffer_type_t buft, bool weights, const char * what);

void drop_rows(llama_steer_state & st);
void drop_kept(llama_steer_state & st);
void forget_rows_of(llama_steer_state & st, int32_t config_id);

// Write row dyn of what reads the state: a part of a vector, or zeros for col == nullptr.
void upload_dyn(const llama_steer_state & st, const std::vector<group> & groups, const std::vector<slot> & slots, int32_t n_dyn,
                int32_t dyn, const steer_vector * col, int32_t part);

void rebuild_bank(llama_steer_state & st, const std::vector<place> & places, int32_t n_dyn, const std::vector<part_key> & dyn_cols,
                  const vectors_by_id & vectors);

bool has_places(const llama_steer_state & st, const std::vector<place> & places);
void make_room(llama_steer_state & st, const std::vector<place> & places, int32_t n_dyn, const std::vector<part_key> & dyn_cols, const vectors_by_id & vectors);

// Have rows for what sequences may still need, as far as the limits go. Throws when there is no memory.
void reserve_rows(llama_steer_state & st, const std::map<llama_seq_id, interval_map<int32_t>> & ranges);
void give_back_rows(llama_steer_state & st);

// The row of group::sum for a combination: resident, or put there in place of the one that was used longest ago.
int32_t row_for(llama_steer_state & st, int32_t config_id, int32_t stream, const float * cb_c, const float * cb_g, int32_t n_cb);

// llama-steer-config.cpp

void set_acting(llama_steer_state & st, config & c);
bool in_use(const llama_steer_state & st, int32_t vector_id);
bool term_covers(const llama_steer_term & t, const place & at, int32_t stream);
// c: what is added along the direction; parts: what depends on the state.
void term_coefficients(const llama_steer_term & t, const direction & d, double & c, std::vector<part_edit> & parts);
// Throws when a term renorms where another op acts.
void check_renorm(const vectors_by_id & vectors, const std::vector<llama_steer_term> & terms);
// Throws when a term, or all of them over all layers, could make a state that float32 does not hold: NaN in a cache is everybody's.
void check_bounds(const llama_steer_state & st, const vectors_by_id & vectors, const std::vector<llama_steer_term> & terms);

// How long a state can become on its way through edited places.
struct growth_bound {
    double size = ANY_STATE;
    double added = 0.0;                                      // at the place that comes next
    std::vector<std::pair<const direction *, double>> along; // read and written along the same direction, with g
    std::vector<std::pair<const column *, double>> columns;

    void take(const direction & d, double c, const std::vector<part_edit> & parts);
    void pass(const place & at); // throws
};

// Content hash of what terms apply (at one place only, if given); 0 = nothing.
uint64_t config_hash(const llama_steer_state & st, const std::vector<llama_steer_term> & terms, const place * only = nullptr);

} // namespace llama_steer
