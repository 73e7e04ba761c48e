// server-steer.cpp - the vectors by name, the requests that run, what the server tells of itself, and its command line.

#include "server-steer-json.h"

#include "common.h"

#include <cstring>
#include <filesystem>
#include <fstream>

using namespace server_steer_json;

namespace {

constexpr size_t MAX_VECTORS      = 1024;
constexpr size_t MAX_VECTOR_BYTES = (size_t) 4 << 30;
constexpr size_t MAX_BODY         = (size_t) 64 << 20;

std::string g_folder;
std::string g_default;

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
        case 404: type = "not_found_error";   break;
        case 409: type = "conflict_error";    break;
        case 411:
        case 413: type = "too_large_error";   break;
        case 429: type = "limit_error";       break;
        case 500: type = "server_error";      break;
        case 501: type = "not_supported_error"; break;
        case 503: type = "unavailable_error"; break;
        default: break;
    }
    return json { {"code", code}, {"message", std::string(what())}, {"type", type} };
}

// ---- tickets ----

struct server_steer_ticket {
    server_steer * owner;
    std::string    id;

    ~server_steer_ticket() {
        std::lock_guard<std::mutex> lock(owner->mutex);
        owner->running.erase(id);
    }
};

server_steer::running_request * server_steer::entry_of(const server_steer_request & request) {
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

std::shared_ptr<server_steer_ticket> server_steer::reserve(server_steer_request & request) {
    const std::string & id = request.id;
    if (id.empty() || id.size() > 64 || !std::all_of(id.begin(), id.end(), [](char c) { return isalnum((unsigned char) c) || strchr("._:-", c); })) {
        bad("request_id " + shown(id) + " is no name for a request: use 1 to 64 of A-Z, a-z, 0-9, '.', '_', ':' and '-'");
    }
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (running.count(id)) {
            throw server_steer_error(409, "request_id " + shown(id) + " is in use: choose another");
        }
        request.serial = next_serial++;
        running[id].serial   = request.serial;
        running[id].steering = given_of(request.terms);
    }
    return std::shared_ptr<server_steer_ticket>(new server_steer_ticket { this, id });
}

// ---- vectors ----

json server_steer::put_vector(const std::string & name, const std::string & body, bool force) {
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
    size_t bytes = vector->bytes();
    for (auto & [other, stored] : store) {
        bytes += other == name ? 0 : stored->bytes();
        if (stored->content_sha256 == vector->content_sha256 && stored->scope == vector->scope && stored->gate == vector->gate) {
            vector = stored; // the same content is held once
        }
    }
    const bool replaced = store.count(name) > 0;
    if ((!replaced && store.size() >= MAX_VECTORS) || bytes > MAX_VECTOR_BYTES) {
        throw server_steer_error(429, string_format("the server holds %zu vectors, the limits are %zu and %zu bytes: delete some with DELETE /steering/vectors/NAME",
                    store.size(), MAX_VECTORS, MAX_VECTOR_BYTES));
    }
    store[name] = vector;
    return json { {"name", name}, {"content_sha256", vector->content_sha256}, {"replaced", replaced} };
}

json server_steer::delete_vector(const std::string & name) {
    check_vector_name(name);
    std::lock_guard<std::mutex> lock(mutex);
    if (!store.erase(name)) {
        throw server_steer_error(404, "no vector " + shown(name) + " is loaded");
    }
    return json { {"name", name}, {"deleted", true} };
}

// What the command line asked for. Throws when it cannot be had.
void server_steer::load_configured() {
    std::vector<std::filesystem::path> files;
    if (!g_folder.empty()) {
        for (const auto & entry : std::filesystem::directory_iterator(g_folder)) {
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
        put_vector(file.stem().string(), data, false);
    }
    if (!files.empty()) {
        SRV_INF("%zu steering vectors loaded from %s\n", files.size(), g_folder.c_str());
    }
    if (!g_default.empty()) {
        json terms;
        try {
            terms = json::parse(g_default);
        } catch (const std::exception &) {
            bad("--steering is not valid JSON: give a list of terms, such as [{\"vector\": \"mood\"}]");
        }
        defaults = parse_terms(terms);
    }
}

void server_steer::check_running(const std::string & id) {
    std::lock_guard<std::mutex> lock(mutex);
    const auto it = running.find(id);
    if (it == running.end() || (it->second.started && it->second.n_slots == 0)) {
        throw server_steer_error(404, "no request " + shown(id) + " is running: it has ended, or never was");
    }
    if (!it->second.started) {
        throw server_steer_error(409, "request " + shown(id) + " waits for a slot: change it once it runs");
    }
}

json server_steer::describe(const json & server) {
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
    json vectors = json::array();
    size_t bytes = 0;
    std::set<const server_steer_vector *> counted;
    for (const auto & [name, v] : store) {
        std::set<int32_t> layers(v->layers.begin(), v->layers.end());
        std::set<std::string> sites;
        for (int32_t s : v->sites) {
            sites.insert(SITES[s]);
        }
        vectors.push_back({
            {"name", name}, {"content_sha256", v->content_sha256}, {"op", v->op}, {"default_scope", v->scope},
            {"layers", std::vector<int32_t>(layers.begin(), layers.end())}, {"sites", std::vector<std::string>(sites.begin(), sites.end())}, {"bytes", v->bytes()},
            {"gate", v->gate.has_value()},
        });
        bytes += counted.insert(v.get()).second ? v->bytes() : 0;
    }
    json requests = json::array();
    for (const auto & [id, r] : running) {
        const char * state = !r.started ? "queued" : r.n_slots > 0 ? "running" : "ended";
        requests.push_back({ {"request_id", id}, {"state", state}, {"steering", r.steering}, {"tokens", r.n_tokens} });
    }
    return json {
        {"protocol", SERVER_STEER_PROTOCOL},
        {"model",    model_json},
        {"vectors",  vectors},
        {"requests", requests},
        {"default",  given_of(defaults)},
        {"limits", {
            {"vectors", MAX_VECTORS}, {"vector_bytes", MAX_VECTOR_BYTES}, {"terms", MAX_TERMS}, {"body_bytes", MAX_BODY},
        }},
        {"memory", { {"vector_bytes", bytes}, {"device_bytes", device_bytes} }},
    };
}

// ---- odds and ends ----

server_http_res_ptr server_steer_router(const server_http_req &) {
    auto res = std::make_unique<server_http_res>();
    const server_steer_error error(501, "a router does not steer: ask one of its models' own servers");
    res->status = error.code;
    res->data   = safe_json_to_str(json {{ "error", error.to_json() }});
    return res;
}

void server_steer_take_args(int & argc, char ** argv) {
    const auto from_env = [](const char * name) {
        const char * value = getenv(name);
        return std::string(value ? value : "");
    };
    g_folder  = from_env("STEER_SERVER_DIR");
    g_default = from_env("STEER_SERVER_DEFAULT");
    int n = 0;
    for (int i = 0; i < argc; ++i) {
        const std::string arg = argv[i];
        std::string * target = arg == "--steering-dir" ? &g_folder : arg == "--steering" ? &g_default : nullptr;
        if (arg == "--help" || arg == "-h" || arg == "--usage") {
            printf("----- steering -----\n\n"
                   "--steering-dir DIR                      load every vector file (*.safetensors) of a folder (env: STEER_SERVER_DIR)\n"
                   "--steering JSON                         default steering of requests that bring none: a list of terms (env: STEER_SERVER_DEFAULT)\n\n");
        }
        if (!target) {
            argv[n++] = argv[i];
        } else if (i + 1 < argc) {
            *target = argv[++i];
        } else {
            argv[n++] = argv[i]; // llama.cpp's parser says what it thinks of it
        }
    }
    argc = n;
    argv[argc] = nullptr;
}

void server_steer_copy_fields(const json & from, json & to) {
    for (const char * key : { "steering", "steering_probe", "steering_tags", "request_id" }) {
        if (from.contains(key)) {
            to[key] = from.at(key);
        }
    }
}

bool server_steer_is_route(const std::string & path) {
    return path.find("/steering") != std::string::npos; // a prefix may come before it
}

int server_steer_body_status(const std::string & method, const std::string & path, const std::string & content_length) {
    if (method != "POST" || !server_steer_is_route(path)) {
        return 0;
    }
    if (content_length.empty() || content_length.size() > 18 || !std::all_of(content_length.begin(), content_length.end(), ::isdigit)) {
        return 411;
    }
    return std::stoull(content_length) > MAX_BODY ? 413 : 0;
}
