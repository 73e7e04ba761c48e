// server-steer-store.cpp - the vectors by name, the requests that run, and what the server tells of itself.

#include "server-steer-store.h"
#include "server-steer-http.h"
#include "server-steer-json.h"

#include "common.h"

#include <cstring>
#include <filesystem>
#include <fstream>

using namespace server_steer_json;

namespace {

constexpr size_t MAX_VECTORS = 1024;
constexpr size_t MAX_VECTOR_BYTES = (size_t) 4 << 30;

bool is_name(const std::string & name, const char * more, size_t most) {
    const auto ok = [&](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || strchr(more, c); };
    return !name.empty() && name.size() <= most && std::all_of(name.begin(), name.end(), [&](char c) { return c != '\0' && ok(c); });
}

void check_vector_name(const std::string & name) {
    if (!is_name(name, "._-", 64) || strchr("._-", name[0])) {
        bad(shown(name) + " is not a vector name: use 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit");
    }
}

} // namespace

json server_steer_error::to_json() const {
    const char * type = "invalid_request_error";
    switch (code) {
        case 403:
            type = "permission_error";
            break;
        case 404:
            type = "not_found_error";
            break;
        case 409:
            type = "conflict_error";
            break;
        case 411:
        case 413:
            type = "too_large_error";
            break;
        case 415:
            type = "media_type_error";
            break;
        case 429:
            type = "limit_error";
            break;
        case 500:
            type = "server_error";
            break;
        case 501:
            type = "not_supported_error";
            break;
        case 503:
            type = "unavailable_error";
            break;
        default:
            break;
    }
    return json{ { "code", code }, { "message", std::string(what()) }, { "type", type } };
}

// ---- tickets ----

struct server_steer_ticket {
    server_steer_store * owner;
    std::string id;

    ~server_steer_ticket() {
        std::lock_guard<std::mutex> lock(owner->mutex);
        owner->running.erase(id);
    }
};

server_steer_store::running_request * server_steer_store::entry_of(const server_steer_request & request) {
    const auto it = running.find(request.id);
    return it != running.end() && it->second.serial == request.serial ? &it->second : nullptr;
}

static json given_of(const server_steer_terms & terms) {
    json res = json::array();
    for (const auto & term : terms) {
        res.push_back(term.given);
    }
    return res;
}

std::shared_ptr<server_steer_ticket> server_steer_store::reserve(server_steer_request & request) {
    const std::string & id = request.id;
    if (id.empty() || id.size() > 64 || !std::all_of(id.begin(), id.end(), [](char c) { return c != '\0' && (isalnum((unsigned char) c) || strchr("._:-", c)); })) {
        bad("request_id " + shown(id) + " is not a name for a request: use 1 to 64 of A-Z, a-z, 0-9, '.', '_', ':' and '-'");
    }
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (running.count(id)) {
            throw server_steer_error(409, "request_id " + shown(id) + " is in use: choose another");
        }
        request.serial = next_serial++;
        running[id].serial = request.serial;
        running[id].terms = request.terms;
    }
    return std::shared_ptr<server_steer_ticket>(new server_steer_ticket{ this, id });
}

// ---- vectors ----

json server_steer_store::put_vector(const std::string & name, const std::string & body, bool force, bool replace) {
    check_vector_name(name);
    if (!unsupported.empty()) {
        bad(unsupported);
    }
    if (body.size() > MAX_BODY) {
        throw server_steer_error(413, string_format("a vector file may have %zu bytes, this one has %zu", MAX_BODY, body.size()));
    }
    server_steer_vector_ptr vector;
    try {
        vector = server_steer_parse_vector(body, identity, info, force);
    } catch (const server_steer_error & e) {
        throw server_steer_error(e.code, "vector " + shown(name) + ": " + e.what());
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (auto & [other, stored] : vectors) {
        if (stored->content_sha256 == vector->content_sha256 && stored->scope == vector->scope && stored->gate == vector->gate) {
            vector = stored; // the same content is held once
        }
    }
    const auto held = vectors.find(name);
    const bool replaced = held != vectors.end() && held->second != vector;
    if (replaced && !replace) {
        throw server_steer_error(409, "another vector " + shown(name) + " is loaded: upload with ?replace=true to put this one in its place, or choose another name");
    }
    // what a request still uses takes memory as well, whether or not it has a name
    size_t bytes = 0;
    bool known = false;
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](const auto & weak) { return weak.expired(); }), alive.end());
    for (const auto & weak : alive) {
        const auto other = weak.lock();
        bytes += other ? other->bytes() : 0;
        known = known || other == vector;
    }
    if ((held == vectors.end() && vectors.size() >= MAX_VECTORS) || (!known && bytes + vector->bytes() > MAX_VECTOR_BYTES)) {
        throw server_steer_error(429, string_format("the server holds %zu vectors, the limits are %zu and %zu bytes: delete some with DELETE /steering/vectors/NAME",
                                                    vectors.size(), MAX_VECTORS, MAX_VECTOR_BYTES));
    }
    if (!known) {
        alive.push_back(vector);
    }
    vectors[name] = vector;
    return json{ { "name", name }, { "content_sha256", vector->content_sha256 }, { "replaced", replaced } };
}

json server_steer_store::delete_vector(const std::string & name) {
    check_vector_name(name);
    std::lock_guard<std::mutex> lock(mutex);
    if (!vectors.erase(name)) {
        throw server_steer_error(404, "no vector " + shown(name) + " is loaded");
    }
    return json{ { "name", name }, { "deleted", true } };
}

// What the command line asked for. Throws when it cannot be had.
void server_steer_store::load_configured(const std::string & folder, const std::string & default_terms) {
    std::vector<std::filesystem::path> files;
    if (!folder.empty()) {
        for (const auto & entry : std::filesystem::directory_iterator(folder)) {
            if (entry.path().extension() == ".safetensors") {
                files.push_back(entry.path());
            }
        }
    }
    std::sort(files.begin(), files.end());
    for (const auto & file : files) {
        if (std::filesystem::file_size(file) > MAX_BODY) {
            bad(file.string() + " is too large for a vector file");
        }
        std::ifstream in(file, std::ios::binary);
        const std::string data((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
        put_vector(file.stem().string(), data, false, false);
    }
    if (!files.empty()) {
        SRV_INF("%zu steering vectors loaded from %s\n", files.size(), folder.c_str());
    }
    if (!default_terms.empty()) {
        json terms;
        try {
            terms = json::parse(default_terms);
        } catch (const std::exception &) {
            bad("--steering is not valid JSON: give a list of terms, such as [{\"vector\": \"mood\"}]");
        }
        defaults = parse_terms(terms);
    }
}

void server_steer_store::check_running(const std::string & id) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto it = running.find(id);
    if (it == running.end() || (it->second.started && it->second.n_slots == 0)) {
        throw server_steer_error(404, "no request " + shown(id) + " is running: it has ended, or never was");
    }
    if (!it->second.started) {
        throw server_steer_error(409, "request " + shown(id) + " waits for a slot: change it once it runs");
    }
}

json server_steer_store::describe(const json & server, const std::set<std::string> & ids) {
    std::lock_guard<std::mutex> lock(mutex);
    json model_json = server;
    model_json["identity"] = identity.to_json();
    if (unsupported.empty()) {
        json sites = json::array();
        for (int32_t i = 0; i < LLAMA_STEER_SITE_COUNT; ++i) {
            if (info.sites[i]) {
                sites.push_back(SITES[i]);
            }
        }
        model_json["sites"] = sites;
        model_json["last_layer_outputs_only"] = info.last_layer_outputs_only;
    } else {
        model_json["error"] = unsupported;
    }
    json listed = json::array();
    size_t bytes = 0;
    std::set<const server_steer_vector *> counted;
    for (const auto & [name, v] : vectors) {
        std::set<int32_t> layers(v->layers.begin(), v->layers.end());
        std::set<std::string> sites;
        for (int32_t s : v->sites) {
            sites.insert(SITES[s]);
        }
        listed.push_back({
            { "name", name },
            { "content_sha256", v->content_sha256 },
            { "op", v->op },
            { "default_scope", v->scope },
            { "layers", std::vector<int32_t>(layers.begin(), layers.end()) },
            { "sites", std::vector<std::string>(sites.begin(), sites.end()) },
            { "bytes", v->bytes() },
            { "gate", v->gate.has_value() },
        });
        bytes += counted.insert(v.get()).second ? v->bytes() : 0;
    }
    json requests = json::array();
    for (const auto & [id, r] : running) {
        if (!ids.count(id)) {
            continue; // an id is all that it takes to change a request: only who knows it is told of it
        }
        const char * state = !r.started ? "queued" : r.n_slots > 0 ? "running"
                                                                   : "ended";
        requests.push_back({ { "request_id", id }, { "state", state }, { "steering", given_of(r.terms) }, { "tokens", r.n_tokens } });
    }
    return json{
        { "protocol", SERVER_STEER_PROTOCOL },
        { "model", model_json },
        { "vectors", listed },
        { "n_requests", running.size() },
        { "requests", requests },
        { "default", given_of(defaults) },
        { "limits", {
                        { "vectors", MAX_VECTORS },
                        { "vector_bytes", MAX_VECTOR_BYTES },
                        { "terms", MAX_TERMS },
                        { "body_bytes", MAX_BODY },
                        { "json_bytes", MAX_JSON },
                    } },
        { "memory", { { "vector_bytes", bytes }, { "device_bytes", device_bytes } } },
    };
}

// ---- what the main thread tells ----

void server_steer_store::note_start(const server_steer_request & request) {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto * entry = entry_of(request)) {
        entry->started = true;
        entry->n_slots++;
    }
}

void server_steer_store::note_end(const server_steer_request & request) {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto * entry = entry_of(request)) {
        entry->n_slots--;
    }
}

void server_steer_store::note_token(const server_steer_request & request) {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto * entry = entry_of(request)) {
        entry->n_tokens++;
    }
}

void server_steer_store::note_terms(const server_steer_request & request) {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto * entry = entry_of(request)) {
        entry->terms = request.terms;
    }
}

void server_steer_store::note_device(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex);
    device_bytes = bytes;
}

bool server_steer_store::is_running(const server_steer_request & request) {
    std::lock_guard<std::mutex> lock(mutex);
    return entry_of(request) != nullptr;
}

// ---- the beginning ----

bool server_steer_store::open(llama_context * ctx, const common_params & params, bool drafts_new) {
    if (is_open) {
        return true; // resumed from sleep: names and vectors are as they were
    }
    drafts = drafts_new;
    try {
        const bool known = llama_steer_context_info(ctx, &info) == LLAMA_STEER_OK;
        identity = server_steer_identity_of(params.model.path, info.n_layer, info.n_embd, info.n_streams);
        if (!known) {
            unsupported = "models of the architecture '" + identity.architecture + "' cannot be steered: it is not in the tested list";
        }
    } catch (const std::exception & e) {
        unsupported = std::string("this model cannot be steered: ") + e.what();
        SRV_WRN("%s\n", unsupported.c_str());
    }
    try {
        load_configured(common_steering().dir, common_steering().terms);
    } catch (const std::exception & e) {
        SRV_ERR("steering: %s\n", e.what());
        return false;
    }
    if (!server_steer_admin(params)) {
        SRV_INF("%s", "steering: uploads, reads and live changes are off (--steering-admin)\n");
    }
    is_open = true;
    return true;
}

// ---- answers ----

void server_steer_copy_fields(const json & from, json & to) {
    for (const char * key : { "steering", "steering_probe", "steering_tags", "request_id" }) {
        if (from.contains(key)) {
            to[key] = from.at(key);
        }
    }
}

void server_steer_merge(json & answer, const server_steer_extra & extra) {
    if (answer.is_null() || (answer.is_array() && answer.empty())) {
        return;
    }
    json & target = answer.is_array() ? answer.at((size_t) 0) : answer;
    if (!target.is_object() || target.contains("event")) {
        return; // the events of other APIs have a fixed form
    }
    if (!extra.request_id.empty()) {
        target["request_id"] = extra.request_id;
    }
    if (extra.has_tokens && target.contains("tokens")) {
        target["tokens"] = extra.tokens;
    }
    if (!extra.probe_names.empty()) {
        json probe = json::object();
        for (size_t i = 0; i < extra.probe_names.size(); ++i) {
            if (extra.whole) {
                probe[extra.probe_names[i]] = extra.probes[i];
            } else {
                probe[extra.probe_names[i]] = extra.probes[i].at(0);
            }
        }
        target["steering_probe"] = probe;
    }
}
