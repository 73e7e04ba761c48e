// llama-steer-config.cpp - what is applied: vectors, configs, and the one place where strength, scale, window, op and stream become
// coefficients.

#include "llama-steer-state.h"

namespace llama_steer {

// ---- coefficients: the one place where strength, scale, window, op, level and stream become c and g ----

bool term_covers(const llama_steer_term & t, const place & at, int32_t stream) {
    return (t.il_first < 0 || at.first >= t.il_first) && (t.il_last < 0 || at.first <= t.il_last) &&
           (t.stream < 0 || stream < 0 || t.stream == stream);
}

static bool is_bound(const llama_steer_term & t) {
    return t.op == LLAMA_STEER_FLOOR || t.op == LLAMA_STEER_CAP;
}

void term_coefficients(const llama_steer_term & t, const direction & d, double & c, std::vector<part_edit> & parts) {
    c = 0.0;
    parts.clear();
    if (t.strength == 0.0) {
        return;
    }
    const auto columns = [&](double strength) {
        for (size_t j = 0; j < d.columns.size(); ++j) {
            const auto & col = d.columns[j];
            if (col.gain != 0.0) {
                parts.push_back({ (int32_t) j, strength * col.gain, col.bias, col.knee, &col, col.hash });
            }
        }
    };
    const auto removes = [&](double strength) {
        if (d.columns.empty()) {
            parts.push_back({ PART_SELF, -strength, 0.0, LINEAR, nullptr, d.hash });
        } else {
            columns(strength);
        }
    };
    switch (t.op) {
        case LLAMA_STEER_ADD:
        case LLAMA_STEER_RENORM:
            c = t.strength * d.scale;
            columns(t.strength);
            break;
        case LLAMA_STEER_PROJECT:
            removes(t.strength);
            break;
        case LLAMA_STEER_CLAMP:
            c = t.strength * d.scale;
            removes(1.0);
            break;
        default: { // floor and cap, of the component in units of the scale
            const double level = t.level * d.scale;
            const int32_t part = (t.op == LLAMA_STEER_FLOOR) == (d.scale >= 0.0) ? PART_FLOOR : PART_CAP;
            const double up = part == PART_FLOOR ? 1.0 : -1.0;
            parts.push_back({ part, up * t.strength, up * level, 0.0, nullptr, hash_double(level, mix64(d.hash ^ (uint64_t) part)) });
        }
    }
}

// Parts of a vector that a term needs on the device.
static std::set<int32_t> parts_of(llama_steer_term t, const steer_vector & vector) {
    t.strength = t.strength == 0.0 ? 1.0 : t.strength; // a callback may wait for it
    std::set<int32_t> res;
    std::vector<part_edit> parts;
    double c;
    for (const auto & [at, d] : vector.dirs) {
        if (term_covers(t, at, -1)) {
            term_coefficients(t, d, c, parts);
            for (const auto & p : parts) {
                res.insert(p.part);
            }
        }
    }
    return res;
}

// Two floors (or caps) of one vector at one place would need two rows, and mean less than the higher one alone.
static void check_levels(const vectors_by_id & vectors, const std::vector<llama_steer_term> & terms) {
    for (const auto & t : terms) {
        for (const auto & other : terms) {
            const bool apart = t.stream >= 0 && other.stream >= 0 && t.stream != other.stream;
            if (!is_bound(t) || t.vector != other.vector || t.op != other.op || t.level == other.level || t.strength == 0.0 || other.strength == 0.0 || apart) {
                continue;
            }
            for (const auto & [at, d] : vectors.at(t.vector).dirs) {
                if (term_covers(t, at, -1) && term_covers(other, at, -1)) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d has the %ss %g and %g at layer %d: give one, or layers of their own", t.vector,
                                                                  t.op == LLAMA_STEER_FLOOR ? "floor" : "cap", t.level, other.level, at.first));
                }
            }
        }
    }
}

void check_renorm(const vectors_by_id & vectors, const std::vector<llama_steer_term> & terms) {
    for (const auto & t : terms) {
        for (const auto & other : terms) {
            const bool apart = t.stream >= 0 && other.stream >= 0 && t.stream != other.stream;
            if (t.op != LLAMA_STEER_RENORM || other.op == LLAMA_STEER_RENORM || t.strength == 0.0 || other.strength == 0.0 || apart) {
                continue;
            }
            for (const auto & [at, d] : vectors.at(t.vector).dirs) {
                if (term_covers(t, at, -1) && term_covers(other, at, -1) && vectors.at(other.vector).dirs.count(at)) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d restores the length at layer %d, where vector %d acts with another op: "
                                                                  "what comes first is not defined",
                                                                  t.vector, at.first, other.vector));
                }
            }
        }
    }
}

// Bounds the largest eigenvalue of the sum of |g| r r^T over unit rows r.
static double row_bound(const std::vector<std::pair<const column *, double>> & parts, std::vector<float> column::*rows) {
    double most = 0.0;
    for (const auto & [a, g] : parts) {
        double row = 0.0;
        for (const auto & [b, other] : parts) {
            double dot = a == b ? 1.0 : 0.0;
            for (size_t i = 0; a != b && i < (a->*rows).size(); ++i) {
                dot += (double) (a->*rows)[i] * (b->*rows)[i];
            }
            row += std::sqrt(std::fabs(g * other)) * std::fabs(dot);
        }
        most = std::max(most, row);
    }
    return most;
}

// By how much the projecting terms at one place can lengthen a state: the norm of I + V g V^T.
static double growth(const std::vector<std::pair<const direction *, double>> & parts) {
    double up = 0.0; // of what amplifies (g > 0), and of what removes and mirrors (g < 0): bounds of their largest eigenvalues
    double down = 0.0;
    for (const auto & [a, g] : parts) {
        double row = 0.0;
        for (const auto & [b, other] : parts) {
            if ((g > 0.0) != (other > 0.0)) {
                continue;
            }
            double dot = 1.0;
            if (a != b && a->hash != b->hash) {
                dot = 0.0;
                for (size_t i = 0; i < a->v.size(); ++i) {
                    dot += (double) a->v[i] * b->v[i];
                }
            }
            row += std::sqrt(std::fabs(g * other)) * std::fabs(dot);
        }
        (g > 0.0 ? up : down) = std::max(g > 0.0 ? up : down, row);
    }
    return std::max({ 1.0, 1.0 + up, down - 1.0 });
}

void growth_bound::take(const direction & d, double c, const std::vector<part_edit> & parts) {
    added += std::fabs(c);
    for (const auto & p : parts) {
        added += std::fabs(p.g * p.bias);
        if (p.col) {
            columns.emplace_back(p.col, p.g);
        } else {
            along.emplace_back(&d, p.part == PART_SELF ? p.g : -std::fabs(p.g)); // a floor or cap removes, as far as it acts
        }
    }
}

void growth_bound::pass(const place & at) {
    const double through = std::sqrt(row_bound(columns, &column::read) * row_bound(columns, &column::write));
    size = ((along.empty() ? 1.0 : growth(along)) + through) * size + added;
    added = 0.0;
    along.clear();
    columns.clear();
    if (!(size <= MAX_STATE)) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("these terms together can let the hidden state grow beyond %g by layer %d, which float32 does not "
                                                      "hold safely: use smaller strengths or fewer layers",
                                                      MAX_STATE, at.first));
    }
}

void check_bounds(const llama_steer_state & st, const vectors_by_id & vectors, const std::vector<llama_steer_term> & terms) {
    std::set<place> places;
    bool by_stream = false;
    for (const auto & t : terms) {
        by_stream = by_stream || t.stream >= 0;
        for (const auto & [at, d] : vectors.at(t.vector).dirs) {
            if (!term_covers(t, at, -1) || t.strength == 0.0) {
                continue;
            }
            places.insert(at);
            if (t.op == LLAMA_STEER_PROJECT && !(t.strength >= LLAMA_STEER_MIN_PROJECT && t.strength <= LLAMA_STEER_MAX_PROJECT)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("strength %g of vector %d is out of range: project takes %g to %g", t.strength, t.vector,
                                                              LLAMA_STEER_MIN_PROJECT, LLAMA_STEER_MAX_PROJECT));
            }
            if (is_bound(t) && !(t.strength >= 0.0 && t.strength <= 1.0)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("strength %g of vector %d is out of range: floor and cap take 0 to 1", t.strength, t.vector));
            }
            if (is_bound(t) && !d.columns.empty()) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d has columns at layer %d, which have no floor or cap", t.vector, at.first));
            }
            const double size = is_bound(t) ? t.level : t.strength;
            if (t.op != LLAMA_STEER_PROJECT && !(std::fabs(size * d.scale) <= LLAMA_STEER_MAX_DOSE)) {
                throw steer_error(LLAMA_STEER_ERR_ARG, format("%s %g of vector %d is too large at layer %d: a dose of %g is the limit",
                                                              is_bound(t) ? "level" : "strength", size, t.vector, at.first, LLAMA_STEER_MAX_DOSE));
            }
            for (const auto & col : d.columns) {
                if (!(std::fabs(t.strength * col.gain) <= LLAMA_STEER_MAX_DOSE)) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("strength %g of vector %d is too large for a column at layer %d", t.strength, t.vector, at.first));
                }
            }
        }
    }
    for (int32_t s = 0; s < (by_stream ? st.n_streams : 1); ++s) {
        growth_bound bound;
        std::vector<part_edit> parts;
        for (const auto & at : places) {
            for (const auto & t : terms) {
                const auto & dirs = vectors.at(t.vector).dirs;
                auto it = dirs.find(at);
                if (it == dirs.end() || !term_covers(t, at, by_stream ? s : -1)) {
                    continue;
                }
                double c;
                term_coefficients(t, it->second, c, parts);
                bound.take(it->second, c, parts);
            }
            bound.pass(at);
        }
    }
}

uint64_t config_hash(const llama_steer_state & st, const std::vector<llama_steer_term> & terms, const place * only) {
    // merged by direction content first: v - v is nothing, whatever the vectors are called
    struct item {
        double c = 0.0;
        double g = 0.0;
        double size_c = 0.0;
        double size_g = 0.0;
    };
    // What a row, which adds up in another order and ends in float32, may find to be nothing has to be nothing here: a place that is
    // expected to act and does not is an error.
    const auto nothing = [](double sum, double size) { return std::fabs(sum) < std::numeric_limits<float>::min() || std::fabs(sum) <= 1e-13 * size; };
    std::map<std::array<uint64_t, 4>, item> items;
    std::vector<part_edit> parts;
    for (const auto & t : terms) {
        auto it = st.vectors.find(t.vector);
        if (it == st.vectors.end()) {
            continue;
        }
        for (const auto & [at, d] : it->second.dirs) {
            if (!term_covers(t, at, -1) || (only && at != *only)) {
                continue;
            }
            const int32_t stream = st.n_streams > 1 ? t.stream : -1;
            const auto item_of = [&](uint64_t hash) -> item & {
                return items[{ hash, (uint64_t) at.first, (uint64_t) at.second, (uint64_t) (stream + 1) | (t.op == LLAMA_STEER_RENORM ? 1ull << 32 : 0) }];
            };
            double c;
            term_coefficients(t, d, c, parts);
            auto & sum = item_of(d.hash);
            sum.c += c;
            sum.size_c += std::fabs(c);
            for (const auto & p : parts) {
                auto & part = item_of(p.hash);
                part.g += p.g;
                part.size_g += std::fabs(p.g);
            }
        }
    }
    uint64_t id = 0;
    bool any = false;
    for (const auto & [key, i] : items) {
        const double c = nothing(i.c, i.size_c) ? 0.0 : i.c;
        const double g = nothing(i.g, i.size_g) ? 0.0 : i.g;
        if (c != 0.0 || g != 0.0) {
            any = true;
            id += mix64(hash_double(g, hash_double(c, hash_bytes(key.data(), sizeof(key), 0x57ee9))));
        }
    }
    return any && id == 0 ? 1 : id;
}

// What a config is remembered by, and where it has to be seen to act.
void set_acting(llama_steer_state & st, config & c) {
    c.id = config_hash(st, c.terms);
    c.fired.clear();
    for (const auto & t : c.terms) {
        for (const auto & [at, d] : st.vectors.at(t.vector).dirs) {
            if (!c.fired.count(at) && term_covers(t, at, -1) && config_hash(st, c.terms, &at) != 0) {
                c.fired[at] = 0;
            }
        }
    }
}

bool in_use(const llama_steer_state & st, int32_t vector) {
    for (const auto & [_, c] : st.configs) {
        for (const auto & t : c.terms) {
            if (t.vector == vector) {
                return true;
            }
        }
    }
    return false;
}

// ---- vectors and configs ----

static void check_row(const float * v, int32_t n_embd, const std::string & what) {
    double sq = 0.0;
    for (int32_t j = 0; j < n_embd; ++j) {
        sq += (double) v[j] * v[j];
    }
    if (!std::isfinite(sq)) {
        throw steer_error(LLAMA_STEER_ERR_ARG, what + " holds NaN or Inf");
    }
    if (std::fabs(std::sqrt(sq) - 1.0) > 1e-3) {
        throw steer_error(LLAMA_STEER_ERR_ARG, what + format(" has norm %g instead of 1", std::sqrt(sq)));
    }
}

static steer_vector read_vector(const llama_steer_state & st, int32_t vector_id, const llama_steer_vector & vector) {
    const int32_t n = vector.n;
    if (n <= 0 || n > st.n_layer * LLAMA_STEER_SITE_COUNT || !vector.layers || !vector.sites || !vector.dirs || !vector.scales) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d needs 1 to %d directions with layers, sites and scales", vector_id, st.n_layer * LLAMA_STEER_SITE_COUNT));
    }
    if (vector.n_columns < 0 || vector.n_columns > n * LLAMA_STEER_MAX_COLUMNS ||
        (vector.n_columns > 0 && (!vector.columns || !vector.reads || !vector.writes))) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d has %d columns, or no rows for them: %d at a place are the limit", vector_id, vector.n_columns, LLAMA_STEER_MAX_COLUMNS));
    }
    steer_vector res;
    for (int32_t i = 0; i < n; ++i) {
        const place at(vector.layers[i], vector.sites[i]);
        st.check_place(at.first, at.second);
        if (!std::isfinite(vector.scales[i])) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the scale of vector %d at layer %d is not finite", vector_id, at.first));
        }
        const float * v = vector.dirs + (size_t) i * st.n_embd;
        check_row(v, st.n_embd, format("the direction of vector %d at layer %d", vector_id, at.first));
        direction d;
        d.v.assign(v, v + st.n_embd);
        d.scale = vector.scales[i];
        d.hash = hash_bytes(v, st.n_embd * sizeof(float), 1);
        if (!res.dirs.emplace(at, std::move(d)).second) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d has two directions at layer %d, %s", vector_id, at.first, site_name(at.second)));
        }
    }
    for (int32_t i = 0; i < vector.n_columns; ++i) {
        const auto & c = vector.columns[i];
        const auto it = res.dirs.find(place(c.layer, c.site));
        if (it == res.dirs.end() || it->second.columns.size() >= LLAMA_STEER_MAX_COLUMNS) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d has a column at layer %d without a direction there, or more than %d", vector_id, c.layer, LLAMA_STEER_MAX_COLUMNS));
        }
        const bool knee = c.knee == LINEAR || (c.knee >= 0.0 && c.knee <= LLAMA_STEER_MAX_DOSE);
        if (!std::isfinite(c.gain) || !(std::fabs(c.bias) <= LLAMA_STEER_MAX_DOSE) || !knee) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("a column of vector %d at layer %d has gain %g, bias %g and knee %g: finite ones are possible, a bias of %g at "
                                                          "most, and a knee from 0 to that",
                                                          vector_id, c.layer, c.gain, c.bias, c.knee, LLAMA_STEER_MAX_DOSE));
        }
        const float * read = vector.reads + (size_t) i * st.n_embd;
        const float * write = vector.writes + (size_t) i * st.n_embd;
        check_row(read, st.n_embd, format("what a column of vector %d reads at layer %d", vector_id, c.layer));
        check_row(write, st.n_embd, format("what a column of vector %d writes at layer %d", vector_id, c.layer));
        column col = { { read, read + st.n_embd }, { write, write + st.n_embd }, c.gain, c.bias, c.knee, 0 };
        col.hash = hash_double(c.knee, hash_double(c.bias, hash_bytes(write, st.n_embd * sizeof(float), hash_bytes(read, st.n_embd * sizeof(float), 2))));
        it->second.columns.push_back(std::move(col));
    }
    return res;
}

void set_vector(llama_steer_state & st, int32_t vector_id, const llama_steer_vector & vector, bool room) {
    st.not_in_callback("changing a vector");
    if (vector_id < 0 || vector_id >= LLAMA_STEER_MAX_VECTORS) {
        throw steer_error(LLAMA_STEER_ERR_LIMIT, format("vector %d is out of range: 0 to %d", vector_id, LLAMA_STEER_MAX_VECTORS - 1));
    }
    steer_vector col = read_vector(st, vector_id, vector);
    auto old = st.vectors.find(vector_id);
    bool used = false; // by a config
    if (old != st.vectors.end()) {
        col.dyn = old->second.dyn;
        auto vectors = st.vectors;
        vectors[vector_id] = col;
        for (const auto & [_, c] : st.configs) {
            for (const auto & t : c.terms) {
                used = used || t.vector == vector_id;
                for (int32_t part : t.vector == vector_id ? parts_of(t, col) : std::set<int32_t>()) {
                    if (!col.dyn.count(part)) {
                        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is used by a config that has no room for how its new content reads the state: clear the config first", vector_id));
                    }
                }
                if (t.vector == vector_id && std::none_of(col.dirs.begin(), col.dirs.end(), [&](const auto & d) { return term_covers(t, d.first, -1); })) {
                    throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is used by a config whose layer window holds none of its new layers", vector_id));
                }
            }
            check_bounds(st, vectors, c.terms);
        }
    }
    std::vector<place> places;
    for (const auto & [at, _] : col.dirs) {
        if (room || used) {
            places.push_back(at);
        }
    }
    if (has_places(st, places)) {
        if (!col.dyn.empty()) {
            st.ctx.synchronize();
        }
        for (const auto & [part, dyn] : col.dyn) {
            upload_dyn(st, st.groups, st.slots, st.n_dyn, dyn, &col, part);
        }
        if (old != st.vectors.end()) {
            drop_rows(st);
        }
    } else {
        auto vectors = st.vectors;
        vectors[vector_id] = col;
        make_room(st, places, st.n_dyn, st.dyn_cols, vectors);
    }
    st.vectors[vector_id] = std::move(col);
    if (used) {
        for (auto & [_, c] : st.configs) {
            set_acting(st, c);
        }
    }
}

void clear_vector(llama_steer_state & st, int32_t vector_id) {
    st.not_in_callback("clearing a vector");
    auto it = st.vectors.find(vector_id);
    if (it == st.vectors.end()) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is not set", vector_id));
    }
    if (in_use(st, vector_id)) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is in use by a config", vector_id));
    }
    if (!it->second.dyn.empty()) {
        st.ctx.synchronize();
    }
    for (const auto & [part, dyn] : it->second.dyn) {
        upload_dyn(st, st.groups, st.slots, st.n_dyn, dyn, nullptr, part);
        st.dyn_cols[dyn] = NO_PART;
    }
    if (st.add_cb) {
        drop_rows(st); // the ones that a callback's coefficients made name vectors by number
    }
    st.vectors.erase(it);
}

// Give a part of a vector a row among those that read the state: a free one, or that of a part which no config needs any longer.
static void promote_to_dyn(const llama_steer_state & st, const part_key & what, int32_t config_id, const std::vector<llama_steer_term> & wanted,
                           const std::set<part_key> & promote, std::vector<part_key> & dyn_cols, vectors_by_id & vectors) {
    auto free = std::find(dyn_cols.begin(), dyn_cols.end(), NO_PART);
    if (free == dyn_cols.end() && (int32_t) dyn_cols.size() >= LLAMA_STEER_MAX_DYN) {
        const auto needs = [&](const std::vector<llama_steer_term> & terms, const part_key & k) {
            return std::any_of(terms.begin(), terms.end(), [&](const llama_steer_term & t) {
                return t.vector == k.first && parts_of(t, vectors.at(k.first)).count(k.second) > 0;
            });
        };
        free = std::find_if(dyn_cols.begin(), dyn_cols.end(), [&](const part_key & k) {
            return !needs(wanted, k) && !promote.count(k) &&
                   std::none_of(st.configs.begin(), st.configs.end(), [&](const auto & c) { return c.first != config_id && needs(c.second.terms, k); });
        });
        if (free == dyn_cols.end()) {
            throw steer_error(LLAMA_STEER_ERR_LIMIT, format("more than %d directions and columns read the state at once: use fewer that project, clamp, bound or respond", LLAMA_STEER_MAX_DYN));
        }
        vectors.at(free->first).dyn.erase(free->second);
    }
    if (free == dyn_cols.end()) {
        dyn_cols.push_back(NO_PART);
        free = dyn_cols.end() - 1;
    }
    *free = what;
    vectors.at(what.first).dyn[what.second] = (int32_t) (free - dyn_cols.begin());
}

void set_config(llama_steer_state & st, int32_t config_id, int32_t n_terms, const llama_steer_term * terms) {
    if (config_id < 1) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("config %d cannot be set: ids start at 1, 0 is no steering", config_id));
    }
    if (n_terms < 0 || n_terms > LLAMA_STEER_MAX_TERMS || (n_terms > 0 && !terms)) {
        throw steer_error(LLAMA_STEER_ERR_LIMIT, format("a config takes 0 to %d terms, not %d", LLAMA_STEER_MAX_TERMS, n_terms));
    }
    std::set<part_key> promote; // what now has to read the state
    for (int32_t i = 0; i < n_terms; ++i) {
        const auto & t = terms[i];
        auto it = st.vectors.find(t.vector);
        if (it == st.vectors.end()) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("vector %d is not set", t.vector));
        }
        if (t.op < LLAMA_STEER_ADD || t.op > LLAMA_STEER_CAP) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("op %d does not exist", t.op));
        }
        if (!std::isfinite(t.strength) || !std::isfinite(t.level)) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the strength or the level of vector %d is not finite", t.vector));
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
        }
        if (!covers) {
            throw steer_error(LLAMA_STEER_ERR_ARG, format("the layer window %d-%d holds none of the layers of vector %d", t.il_first, t.il_last, t.vector));
        }
        for (int32_t part : parts_of(t, it->second)) {
            if (!it->second.dyn.count(part)) {
                promote.insert({ t.vector, part });
            }
        }
    }

    const std::vector<llama_steer_term> wanted(terms, terms + n_terms);
    check_bounds(st, st.vectors, wanted);
    check_renorm(st.vectors, wanted);
    check_levels(st.vectors, wanted);

    std::vector<place> places;
    bool renorms = st.norms;
    for (const auto & t : wanted) {
        renorms = renorms || t.op == LLAMA_STEER_RENORM;
        for (const auto & [at, _] : st.vectors.at(t.vector).dirs) {
            if (term_covers(t, at, -1)) {
                places.push_back(at);
            }
        }
    }
    const bool more = !has_places(st, places) || renorms != st.norms;
    if (!promote.empty() || more) {
        st.not_in_callback("a config that needs new layers or another kind of edit");
        auto dyn_cols = st.dyn_cols;
        auto vectors = st.vectors;
        for (const auto & k : promote) {
            promote_to_dyn(st, k, config_id, wanted, promote, dyn_cols, vectors);
        }
        int32_t n_dyn = promote.empty() ? st.n_dyn : std::max(st.n_dyn, 4);
        while (n_dyn < (int32_t) dyn_cols.size()) {
            n_dyn *= 2;
        }
        if (more || n_dyn != st.n_dyn) {
            const bool norms = st.norms;
            st.norms = renorms;
            try {
                make_room(st, places, n_dyn, dyn_cols, vectors);
            } catch (...) {
                st.norms = norms;
                st.want_all();
                throw;
            }
        } else {
            st.ctx.synchronize();
            for (const auto & [k, part] : promote) {
                upload_dyn(st, st.groups, st.slots, st.n_dyn, vectors.at(k).dyn.at(part), &vectors.at(k), part);
            }
            drop_rows(st); // a vector may have lost its place
        }
        st.dyn_cols = std::move(dyn_cols);
        st.vectors = std::move(vectors);
    }

    auto & c = st.configs[config_id];
    c.terms = wanted;
    set_acting(st, c);
    forget_rows_of(st, config_id);
}

void clear_config(llama_steer_state & st, int32_t config_id) {
    if (!st.configs.erase(config_id)) {
        throw steer_error(LLAMA_STEER_ERR_ARG, format("config %d is not set", config_id));
    }
    forget_rows_of(st, config_id);
    for (auto & [_, r] : st.ranges) {
        for (auto & [p, id] : r.starts) {
            id = id == config_id ? 0 : id;
        }
    }
}

} // namespace llama_steer
