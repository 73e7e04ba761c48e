// server-steer-vectors.cpp - vector files and the identity of a model, read without trust.

#include "server-steer-http.h"
#include "server-steer-json.h"
#include "server-steer-sha256.h"

#include "gguf.h"

#include <cmath>
#include <cstring>
#include <fstream>

using namespace server_steer_json;

// ---- identity ----

json server_steer_identity::to_json() const {
    return json{
        { "architecture", architecture },
        { "n_layer", n_layer },
        { "n_embd", n_embd },
        { "tokens_sha256", tokens_sha256 },
        { "norms_sha256", norms_sha256 },
        { "name", name },
        { "n_streams", n_streams },
    };
}

namespace {

bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// the norm tensors of one file: float32, one dimension, named *_norm.weight
void read_norms(const std::string & path, const gguf_context * gguf, const ggml_context * meta, std::map<std::string, std::string> & norms) {
    std::ifstream file(path, std::ios::binary);
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
        const std::string name = gguf_get_tensor_name(gguf, i);
        if (gguf_get_tensor_type(gguf, i) != GGML_TYPE_F32 || !ends_with(name, "_norm.weight")) {
            continue;
        }
        const ggml_tensor * t = ggml_get_tensor(const_cast<ggml_context *>(meta), name.c_str());
        if (!t || ggml_n_dims(t) != 1) {
            continue;
        }
        std::string data(ggml_nbytes(t), '\0');
        file.seekg((std::streamoff)(gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i)));
        file.read(&data[0], (std::streamsize) data.size());
        if (!file) {
            throw server_steer_error(500, "cannot read " + name + " of " + path);
        }
        norms[name] = std::move(data);
    }
}

struct gguf_file {
    ggml_context * meta = nullptr;
    gguf_context * gguf = nullptr;
    explicit gguf_file(const std::string & path) {
        gguf = gguf_init_from_file(path.c_str(), { /*.no_alloc =*/true, /*.ctx =*/&meta });
        if (!gguf) {
            throw server_steer_error(500, "cannot read the header of " + path);
        }
    }
    ~gguf_file() {
        gguf_free(gguf);
        ggml_free(meta);
    }
    gguf_file(const gguf_file &) = delete;
    gguf_file & operator=(const gguf_file &) = delete;

    std::string text(const char * key) const {
        const int64_t id = gguf_find_key(gguf, key);
        return id < 0 || gguf_get_kv_type(gguf, id) != GGUF_TYPE_STRING ? "" : gguf_get_val_str(gguf, id);
    }
};

} // namespace

server_steer_identity server_steer_identity_of(const std::string & path, int32_t n_layer, int32_t n_embd, int32_t n_streams) {
    server_steer_identity res;
    res.n_layer = n_layer;
    res.n_embd = n_embd;
    res.n_streams = n_streams;

    std::map<std::string, std::string> norms;
    int n_split = 1;
    {
        gguf_file first(path);
        res.architecture = first.text("general.architecture");
        res.name = first.text("general.name");

        const int64_t tokens = gguf_find_key(first.gguf, "tokenizer.ggml.tokens");
        if (tokens < 0 || gguf_get_kv_type(first.gguf, tokens) != GGUF_TYPE_ARRAY || gguf_get_arr_type(first.gguf, tokens) != GGUF_TYPE_STRING) {
            throw server_steer_error(500, path + " has no token list");
        }
        server_steer_sha256 digest;
        for (size_t i = 0; i < gguf_get_arr_n(first.gguf, tokens); ++i) {
            const std::string token = gguf_get_arr_str(first.gguf, tokens, i);
            digest.update_u32((uint32_t) token.size());
            digest.update(token);
        }
        res.tokens_sha256 = digest.hex();

        const int64_t split = gguf_find_key(first.gguf, "split.count");
        if (split >= 0 && gguf_get_kv_type(first.gguf, split) == GGUF_TYPE_UINT16) {
            n_split = std::max(1, (int) gguf_get_val_u16(first.gguf, split));
        }
        read_norms(path, first.gguf, first.meta, norms);
    }
    if (n_split > 1) {
        std::vector<char> prefix(path.size() + 64);
        std::vector<char> shard(path.size() + 128);
        if (llama_split_prefix(prefix.data(), prefix.size(), path.c_str(), 0, n_split) <= 0) {
            throw server_steer_error(500, path + " is split but not named as a first shard");
        }
        for (int i = 1; i < n_split; ++i) {
            llama_split_path(shard.data(), shard.size(), prefix.data(), i, n_split);
            gguf_file next(shard.data());
            read_norms(shard.data(), next.gguf, next.meta, norms);
        }
    }
    server_steer_sha256 digest;
    for (const auto & [name, data] : norms) { // sorted by name
        digest.update(name);
        digest.update(data);
    }
    res.norms_sha256 = digest.hex();
    return res;
}

// ---- vector files ----

namespace {

constexpr size_t MAX_HEADER_BYTES = 1u << 20;

std::string text_at(const json & data, const char * key) {
    if (!data.contains(key) || !data.at(key).is_string()) {
        bad(std::string("'") + key + "' is missing or not a string");
    }
    return data.at(key).get<std::string>();
}

// "<kind>.<layer>.<site>"
bool parse_tensor_name(const std::string & name, std::string & kind, int32_t & layer, int32_t & site) {
    size_t at = name.find('.');
    kind = name.substr(0, at);
    if (at == std::string::npos || (kind != "direction" && kind != "read" && kind != "write")) {
        return false;
    }
    at++;
    size_t end = at;
    while (end < name.size() && name[end] >= '0' && name[end] <= '9') {
        end++;
    }
    const size_t digits = end - at;
    if (digits < 1 || digits > 9 || (digits > 1 && name[at] == '0') || end >= name.size() || name[end] != '.') {
        return false;
    }
    layer = std::stoi(name.substr(at, digits));
    for (site = 0; site < LLAMA_STEER_SITE_COUNT; ++site) {
        if (name.substr(end + 1) == SITES[site]) {
            return true;
        }
    }
    return false;
}

struct stored_direction {
    std::vector<float> values;
    double scale = 0.0;
    std::vector<llama_steer_column> columns;
    std::vector<float> reads; // [columns][n_embd]
    std::vector<float> writes;
};

using stored_directions = std::map<std::pair<int32_t, std::string>, stored_direction>; // sorted as they are hashed

float float_at(const char * bytes) {
    const auto * b = reinterpret_cast<const uint8_t *>(bytes);
    const uint32_t bits = (uint32_t) b[0] | (uint32_t) b[1] << 8 | (uint32_t) b[2] << 16 | (uint32_t) b[3] << 24;
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

int64_t whole(const json & value, const std::string & what) {
    if (!value.is_number_integer()) {
        bad(what + " is not a whole number");
    }
    return value.get<int64_t>();
}

// Rows of unit length: one, or for n_rows > 0 a matrix of so many.
std::vector<float> read_rows(const std::string & name, const json & entry, const char * data, size_t size, int32_t n_rows, int32_t n_embd,
                             std::vector<std::pair<size_t, size_t>> & spans) {
    if (!entry.is_object() || entry.size() != 3 || !entry.contains("dtype") || !entry.contains("shape") || !entry.contains("data_offsets")) {
        bad("the entry of tensor " + name + " is malformed");
    }
    const json & dtype = entry.at("dtype");
    if (!dtype.is_string() || dtype.get<std::string>() != "F32") {
        bad("tensor " + name + " is not F32");
    }
    const json & shape = entry.at("shape");
    const size_t dims = n_rows > 0 ? 2 : 1;
    if (!shape.is_array() || shape.size() != dims || whole(shape.at(dims - 1), "the shape of " + name) != n_embd ||
        (n_rows > 0 && whole(shape.at(0), "the shape of " + name) != n_rows)) {
        bad("tensor " + name + " does not have the shape [" + (n_rows > 0 ? string_format("%d, %d]", n_rows, n_embd) : string_format("%d]", n_embd)));
    }
    const size_t count = (size_t) std::max(1, n_rows) * n_embd;
    const json & offsets = entry.at("data_offsets");
    if (!offsets.is_array() || offsets.size() != 2) {
        bad("tensor " + name + " has malformed data_offsets");
    }
    const int64_t begin = whole(offsets.at(0), "an offset of " + name);
    const int64_t end = whole(offsets.at(1), "an offset of " + name);
    if (begin < 0 || end < begin || (uint64_t) end > size) {
        bad("truncated: the data of tensor " + name + " does not fit into the file");
    }
    if (end - begin != (int64_t) count * 4) {
        bad("tensor " + name + string_format(" has %lld bytes of data, not %lld", (long long) (end - begin), (long long) count * 4));
    }
    spans.emplace_back((size_t) begin, (size_t) end);

    std::vector<float> res(count);
    for (size_t row = 0; row < count; row += n_embd) {
        double norm2 = 0.0;
        for (size_t i = row; i < row + n_embd; ++i) {
            res[i] = float_at(data + begin + 4 * i);
            if (!std::isfinite(res[i])) {
                bad("tensor " + name + " contains NaN or Inf");
            }
            norm2 += (double) res[i] * res[i];
        }
        if (std::abs(std::sqrt(norm2) - 1.0) > 1e-3) {
            bad("tensor " + name + string_format(" has length %.6g: stored directions have length 1", std::sqrt(norm2)));
        }
    }
    return res;
}

double number_at(const json & data, const char * key, const std::string & what) {
    if (!data.contains(key) || !data.at(key).is_number() || !std::isfinite(data.at(key).get<double>())) {
        bad(what + ": its " + key + " is no finite number");
    }
    return data.at(key).get<double>();
}

// The columns of each place, by the "<layer>.<site>" of their tensors, without their rows.
std::map<std::string, std::vector<llama_steer_column>> read_columns(const json & value) {
    std::map<std::string, std::vector<llama_steer_column>> res;
    if (!value.is_object() || value.empty()) {
        bad("'columns' is not an object that says what is read where");
    }
    for (const auto & entry : value.items()) {
        const std::string where = "the columns at " + shown(entry.key());
        if (!entry.value().is_array() || entry.value().empty() || entry.value().size() > LLAMA_STEER_MAX_COLUMNS) {
            bad(where + string_format(" are not a list of 1 to %d", LLAMA_STEER_MAX_COLUMNS));
        }
        for (size_t i = 0; i < entry.value().size(); ++i) {
            const json & item = entry.value().at(i);
            if (!item.is_object() || item.size() != 3) {
                bad(where + " do not have just gain, bias and knee");
            }
            llama_steer_column column = {};
            column.gain = number_at(item, "gain", where);
            column.bias = number_at(item, "bias", where);
            if (!item.contains("knee")) {
                bad(where + " do not have just gain, bias and knee");
            }
            column.knee = item.at("knee").is_null() ? -INFINITY : number_at(item, "knee", where);
            if (std::abs(column.bias) > LLAMA_STEER_MAX_DOSE || (std::isfinite(column.knee) && !(column.knee >= 0.0 && column.knee <= LLAMA_STEER_MAX_DOSE))) {
                bad(where + string_format(" have a bias beyond %g, or a knee that is not from 0 to that", LLAMA_STEER_MAX_DOSE));
            }
            res[entry.key()].push_back(column);
        }
    }
    return res;
}

void hash_floats(server_steer_sha256 & digest, const float * values, size_t n) {
    for (size_t i = 0; i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        digest.update_u32(bits);
    }
}

void hash_double(server_steer_sha256 & digest, double value) {
    const double plus = value + 0.0; // -0.0 is hashed as 0.0
    uint64_t bits;
    memcpy(&bits, &plus, sizeof(bits));
    digest.update_u32((uint32_t) bits);
    digest.update_u32((uint32_t) (bits >> 32));
}

std::string content_hash(const std::string & op, const stored_directions & directions) {
    server_steer_sha256 digest;
    const bool columns = std::any_of(directions.begin(), directions.end(), [](const auto & d) { return !d.second.columns.empty(); });
    digest.update(std::string(columns ? "steer-content-v2\0" : "steer-content-v1\0", 17));
    digest.update(op + std::string(1, '\0'));
    for (const auto & [key, d] : directions) {
        digest.update_u32((uint32_t) key.first);
        digest.update(key.second + std::string(1, '\0'));
        digest.update_u32((uint32_t) d.values.size());
        hash_floats(digest, d.values.data(), d.values.size());
        hash_double(digest, d.scale);
        if (columns) {
            digest.update_u32((uint32_t) d.columns.size());
            for (size_t i = 0; i < d.columns.size(); ++i) {
                hash_floats(digest, d.reads.data() + i * d.values.size(), d.values.size());
                hash_floats(digest, d.writes.data() + i * d.values.size(), d.values.size());
                hash_double(digest, d.columns[i].gain);
                hash_double(digest, d.columns[i].bias);
                hash_double(digest, d.columns[i].knee);
            }
        }
    }
    return digest.hex();
}

// What is stored, as it is applied: another writer's rounding is taken out of rows, as our own reader does it.
double make_unit(float * row, int32_t n_embd) {
    double norm2 = 0.0;
    for (int32_t i = 0; i < n_embd; ++i) {
        norm2 += (double) row[i] * row[i];
    }
    const double norm = std::sqrt(norm2);
    if (std::abs(norm - 1.0) <= 1e-6) {
        return 1.0;
    }
    for (int32_t i = 0; i < n_embd; ++i) {
        row[i] = (float) (row[i] / norm);
    }
    return norm;
}

void check_identity(const json & stored, const server_steer_identity & model, bool force) {
    if (stored.is_null()) {
        return; // its width and layers are checked
    }
    if (!stored.is_object()) {
        bad("its 'identity' is neither an object nor null");
    }
    const auto differs = [&](const char * field, const std::string & want) {
        return text_at(stored, field) != want;
    };
    const auto number = [&](const char * field) {
        if (!stored.contains(field)) {
            bad(std::string("its identity lacks ") + field);
        }
        return whole(stored.at(field), std::string("its identity's ") + field);
    };
    const std::string other = text_at(stored, "architecture") + string_format(" with %lld layers of %lld", (long long) number("n_layer"), (long long) number("n_embd"));
    if (differs("architecture", model.architecture) || number("n_layer") != model.n_layer || number("n_embd") != model.n_embd) {
        bad("it was made for " + other + ", this model is " + model.architecture + string_format(" with %d layers of %d", model.n_layer, model.n_embd) +
            ": fit it on this model (steer train)");
    }
    if (differs("tokens_sha256", model.tokens_sha256)) {
        bad("it was made for " + other + " with another vocabulary: fit it on this model (steer train)");
    }
    if (differs("norms_sha256", model.norms_sha256) && !force) {
        bad("it was made for a model that differs in its norm weights, such as a fine-tune of this one: fit it on this model (steer train), or upload it with ?force=true");
    }
}

} // namespace

static server_steer_gate read_gate(const json & data) {
    server_steer_gate res;
    if (!data.is_object() || data.size() != 3 || !data.contains("threshold") || !data.contains("compare") || !data.contains("positions")) {
        bad("its gate does not have just threshold, compare and positions");
    }
    const json & threshold = data.at("threshold");
    if (!threshold.is_number() || !(std::abs(threshold.get<double>()) <= 1.0)) {
        bad("the threshold of its gate is no cosine");
    }
    res.threshold = threshold.get<double>();
    const std::string compare = text_at(data, "compare");
    const std::string positions = text_at(data, "positions");
    if ((compare != "above" && compare != "below") || (positions != "mean" && positions != "last")) {
        bad("its gate compares " + shown(compare) + " at " + shown(positions) + ": above or below, mean or last");
    }
    res.above = compare == "above";
    res.mean = positions == "mean";
    return res;
}

server_steer_vector_ptr server_steer_parse_vector(const std::string & file, const server_steer_identity & model, const llama_steer_info & info, bool force) {
    if (file.size() < 10) {
        bad("not a safetensors file");
    }
    uint64_t length = 0;
    for (int i = 7; i >= 0; --i) {
        length = length << 8 | (uint8_t) file[i];
    }
    if (length < 2 || length > MAX_HEADER_BYTES || length > file.size() - 8) {
        bad("not a safetensors file, or truncated: its header does not fit into it, or is longer than 1 MiB");
    }
    const json header = server_steer_parse_object(file.substr(8, length), "the safetensors header");
    const char * data = file.data() + 8 + length;
    const size_t size = file.size() - 8 - length;

    if (!header.contains("__metadata__") || !header.at("__metadata__").is_object() || !header.at("__metadata__").contains("steer") ||
        !header.at("__metadata__").at("steer").is_string()) {
        bad("a safetensors file without a steering vector (no 'steer' metadata)");
    }
    const json meta = server_steer_parse_object(header.at("__metadata__").at("steer").get<std::string>(), "the 'steer' metadata");
    const bool has_columns = text_at(meta, "format") == "steer-vector-v2";
    if (!has_columns && text_at(meta, "format") != "steer-vector-v1") {
        bad("unknown format version " + shown(text_at(meta, "format")) + ": this server knows steer-vector-v1 and steer-vector-v2");
    }
    std::set<std::string> fields = { "format", "name", "op", "default_scope", "n_embd", "scales", "identity", "provenance", "calibration", "content_sha256" };
    if (has_columns) {
        fields.insert("columns");
    }
    for (const auto & field : fields) {
        if (!meta.contains(field)) {
            bad("the 'steer' metadata lacks '" + field + "'");
        }
    }
    for (const auto & entry : meta.items()) {
        if (!fields.count(entry.key())) {
            bad("the 'steer' metadata has the unknown field " + shown(entry.key()));
        }
    }
    const int64_t n_embd = whole(meta.at("n_embd"), "'n_embd'");
    if (n_embd != model.n_embd) {
        bad(string_format("its directions have %lld numbers, this model %d", (long long) n_embd, model.n_embd));
    }
    check_identity(meta.at("identity"), model, force);

    auto res = std::make_shared<server_steer_vector>();
    res->n_embd = (int32_t) n_embd;
    res->op = text_at(meta, "op");
    res->scope = text_at(meta, "default_scope");
    res->content_sha256 = text_at(meta, "content_sha256");
    if (res->op != "add" && res->op != "project" && res->op != "clamp" && res->op != "renorm") {
        bad("unknown op " + shown(res->op));
    }

    const json & provenance = meta.at("provenance");
    if (provenance.is_object() && provenance.contains("gate")) {
        res->gate = read_gate(provenance.at("gate"));
    }

    const json & scales = meta.at("scales");
    if (!scales.is_object()) {
        bad("'scales' is not an object");
    }
    auto columns = has_columns ? read_columns(meta.at("columns")) : decltype(read_columns(json())){};
    stored_directions directions;
    std::vector<std::pair<size_t, size_t>> spans;
    for (const auto & entry : header.items()) {
        const std::string & name = entry.key();
        if (name == "__metadata__") {
            continue;
        }
        std::string kind;
        int32_t layer = 0;
        int32_t site = 0;
        if (!parse_tensor_name(name, kind, layer, site)) {
            bad("unknown tensor " + shown(name) + ": directions are named direction.<layer>.<site>");
        }
        if (layer >= info.n_layer) {
            bad(string_format("it has a direction for layer %d, this model has layers 0 to %d", layer, info.n_layer - 1));
        }
        if (!info.sites[site]) {
            bad(std::string("it acts at ") + SITES[site] + ", which this architecture does not offer");
        }
        auto & direction = directions[{ layer, SITES[site] }];
        if (kind != "direction") {
            const auto found = columns.find(name.substr(kind.size() + 1));
            if (found == columns.end()) {
                bad("tensor " + name + " belongs to no column");
            }
            direction.columns = found->second;
            auto & rows = kind == "read" ? direction.reads : direction.writes;
            rows = read_rows(name, entry.value(), data, size, (int32_t) direction.columns.size(), res->n_embd, spans);
            continue;
        }
        direction.values = read_rows(name, entry.value(), data, size, 0, res->n_embd, spans);
        if (!scales.contains(name) || !scales.at(name).is_number()) {
            bad("tensor " + name + " has no scale");
        }
        direction.scale = scales.at(name).get<double>();
        if (!std::isfinite(direction.scale)) {
            bad("the scale of " + name + " is not finite");
        }
    }
    if (directions.empty()) {
        bad("it holds no direction");
    }
    size_t n_columns = 0;
    for (const auto & [key, d] : directions) {
        if (d.values.empty() || d.reads.empty() != d.writes.empty()) {
            bad(string_format("layer %d has tensors for columns, but not all of direction, read and write", key.first));
        }
        n_columns += d.columns.empty() ? 0 : 1;
    }
    if (n_columns != columns.size()) {
        bad("a column has no tensors");
    }
    if (res->gate && directions.size() != 1) {
        bad(string_format("a gate looks at one layer and site, this one has %zu directions", directions.size()));
    }
    if (scales.size() != directions.size()) {
        bad("a scale has no tensor");
    }
    std::sort(spans.begin(), spans.end());
    size_t edge = 0;
    for (const auto & [begin, end] : spans) {
        if (begin != edge) {
            bad("its tensors overlap or leave gaps");
        }
        edge = end;
    }
    if (edge != size) {
        bad("bytes follow the last tensor");
    }
    if (content_hash(res->op, directions) != res->content_sha256) {
        bad("damaged: the directions and scales do not match their content_sha256");
    }

    for (auto & [key, d] : directions) {
        d.scale *= make_unit(d.values.data(), res->n_embd);
        res->layers.push_back(key.first);
        res->sites.push_back((int32_t) (std::find(SITES, SITES + LLAMA_STEER_SITE_COUNT, key.second) - SITES));
        res->scales.push_back(d.scale);
        res->dirs.insert(res->dirs.end(), d.values.begin(), d.values.end());
        for (size_t i = 0; i < d.columns.size(); ++i) {
            auto & column = d.columns[i];
            column.layer = res->layers.back();
            column.site = res->sites.back();
            // phi(s z) is s phi(z) with a knee at 1/s of where it was
            const double length = make_unit(d.reads.data() + i * res->n_embd, res->n_embd);
            column.bias /= length;
            column.knee /= length;
            column.gain *= length * make_unit(d.writes.data() + i * res->n_embd, res->n_embd);
            res->columns.push_back(column);
        }
        res->reads.insert(res->reads.end(), d.reads.begin(), d.reads.end());
        res->writes.insert(res->writes.end(), d.writes.begin(), d.writes.end());
    }
    res->native.key = res->content_sha256.c_str();
    res->native.n = (int32_t) res->n();
    res->native.layers = res->layers.data();
    res->native.sites = res->sites.data();
    res->native.dirs = res->dirs.data();
    res->native.scales = res->scales.data();
    res->native.n_columns = (int32_t) res->columns.size();
    res->native.columns = res->columns.data();
    res->native.reads = res->reads.data();
    res->native.writes = res->writes.data();
    return res;
}
