// server-steer-http.cpp - the door of the steering routes.
//
// A page in a browser of this machine reaches every port of it, without the user's knowing. What it cannot do is to leave out the
// Origin header, or to send a JSON body to another origin without asking first.

#include "server-steer-http.h"
#include "server-steer-compat.h"
#include "server-steer-json.h"

#include "common.h"

#include <algorithm>
#include <cstring>

using namespace server_steer_json;

namespace {

constexpr int MAX_DEPTH = 32; // of nested JSON: a level takes a hundred times more memory than the byte that opens it

const char * const FIELDS[] = { "steering", "steering_probe", "steering_tags" };

std::string lower(std::string text) {
    for (char & c : text) {
        c = c >= 'A' && c <= 'Z' ? (char) (c - 'A' + 'a') : c;
    }
    return text;
}

// The host of "host:port", "[::1]:port" or "::1", in lower case; "" where there is none.
std::string host_of(const std::string & authority) {
    if (!authority.empty() && authority[0] == '[') {
        const size_t end = authority.find(']');
        return end == std::string::npos ? "" : lower(authority.substr(1, end - 1));
    }
    const size_t colon = authority.find(':');
    const bool many = colon != std::string::npos && authority.find(':', colon + 1) != std::string::npos;
    return lower(many ? authority : authority.substr(0, colon));
}

// The host of an Origin; "" for "null" and whatever is not http or https.
std::string host_of_origin(const std::string & origin) {
    for (const char * scheme : { "http://", "https://" }) {
        if (origin.rfind(scheme, 0) == 0) {
            const std::string authority = origin.substr(strlen(scheme));
            return authority.find_first_of("/@?#") == std::string::npos ? host_of(authority) : "";
        }
    }
    return "";
}

// four numbers, or something with a colon in it: no name that somebody's DNS could point here
bool is_address(const std::string & host) {
    if (host.find(':') != std::string::npos) {
        return true;
    }
    int dots = 0;
    for (char c : host) {
        if (c != '.' && (c < '0' || c > '9')) {
            return false;
        }
        dots += c == '.';
    }
    return dots == 3;
}

bool is_loopback(const std::string & host) {
    static const std::string local = ".localhost";
    const bool below = host.size() > local.size() && host.compare(host.size() - local.size(), local.size(), local) == 0;
    return host == "localhost" || below || host == "::1" || (is_address(host) && host.rfind("127.", 0) == 0);
}

bool is_socket(const std::string & host) {
    return host.size() > 5 && host.compare(host.size() - 5, 5, ".sock") == 0;
}

// Does the server listen to this machine only?
bool listens_locally(const common_params & params) {
    const auto hosts = server_steer_compat::hostnames(params, 0);
    return std::all_of(hosts.begin(), hosts.end(), [](const std::string & host) {
        return is_socket(host) || is_loopback(lower(host));
    });
}

bool is_named_origin(const common_params & params, const std::string & origin) {
    for (const auto & allowed : string_split<std::string>(server_steer_compat::named_origins(params, 0), ',')) {
        if (string_strip(allowed) == origin) {
            return true;
        }
    }
    return false;
}

bool is_foreign(const common_params & params, const std::string & origin, const std::string & host) {
    const std::string from = host_of_origin(origin);
    if (is_named_origin(params, origin)) {
        return false;
    }
    if (from.empty()) {
        return true;
    }
    // a name that is not localhost and still leads to a server that listens here only is another's, pointed at us by his DNS
    return !is_loopback(from) && !(from == host && (is_address(from) || !listens_locally(params)));
}

// "POST /steering/vectors/x" without the prefix of --api-prefix; "" for other routes
std::string route_of(const std::string & path) {
    const size_t at = path.find("/steering");
    return at == std::string::npos ? "" : path.substr(at);
}

} // namespace

bool server_steer_admin(const common_params & params) {
    if (common_steering().admin == "on" || common_steering().admin == "off") {
        return common_steering().admin == "on";
    }
    return listens_locally(params) || !params.api_keys.empty();
}

bool server_steer_is_route(const std::string & path) {
    return !route_of(path).empty();
}

std::optional<server_steer_error> server_steer_refusal(const common_params & params, const std::string & method, const std::string & path, const server_steer_header & header) {
    const std::string route = route_of(path);
    if (route.empty()) {
        return std::nullopt;
    }
    const std::string origin = header("Origin");
    if (!origin.empty() && is_foreign(params, origin, host_of(header("Host")))) {
        return server_steer_error(403, "pages of " + shown(origin) + " may not steer this server: name that origin with --cors-origins if they should");
    }
    if (method == "GET") {
        return std::nullopt;
    }
    if (!server_steer_admin(params)) {
        return server_steer_error(403, common_steering().admin == "off"
                                           ? "uploads, reads and live changes are switched off here: start the server with --steering-admin on"
                                           : "uploads, reads and live changes are off where others can reach the server without a key: start it with --api-key, or with --steering-admin on");
    }
    const bool upload = route.rfind("/steering/vectors/", 0) == 0;
    const bool json_route = route == "/steering/read" || route == "/steering/logprobs" || route.rfind("/steering/requests/", 0) == 0;
    const size_t most = method == "POST" && upload ? MAX_BODY : MAX_JSON;
    const std::string length = header("Content-Length");
    if (method == "POST" || !length.empty() || !header("Transfer-Encoding").empty()) {
        const bool digits = !length.empty() && length.size() <= 18 && std::all_of(length.begin(), length.end(), [](char c) { return c >= '0' && c <= '9'; });
        if (!digits || !header("Transfer-Encoding").empty()) {
            return server_steer_error(411, "a steering request needs a Content-Length");
        }
        if (std::stoull(length) > most) {
            return server_steer_error(413, string_format("the body is larger than the %zu bytes that this request may have", most));
        }
    }
    if (method == "POST" && (upload || json_route)) {
        const std::string given = header("Content-Type");
        const char * const want = upload ? "application/octet-stream" : "application/json";
        if (lower(string_strip(given.substr(0, given.find(';')))) != want) {
            return server_steer_error(415, given.empty() ? std::string("the Content-Type is missing: send ") + want : "the Content-Type is " + shown(given) + ": send " + want);
        }
    }
    return std::nullopt;
}

server_http_context::handler_t server_steer_guard(const std::string & path, const server_http_context::handler_t & handler) {
    // those that take the fields, those of our own, and those that compute nothing with the model
    static const std::set<std::string> open = {
        "/completion",
        "/completions",
        "/v1/completions",
        "/chat/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/responses",
        "/v1/messages",
        "/infill",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/chat/completions/input_tokens",
        "/v1/chat/completions/input_tokens",
        "/responses/input_tokens",
        "/v1/responses/input_tokens",
        "/v1/messages/count_tokens",
    };
    if (open.count(path) || server_steer_is_route(path)) {
        return handler;
    }
    return [path, handler](const server_http_req & req) -> server_http_res_ptr {
        for (const char * field : FIELDS) {
            if (req.body.find(std::string("\"") + field + "\"") == std::string::npos) {
                continue;
            }
            json body;
            try {
                body = json::parse(req.body);
            } catch (const std::exception &) {
                break; // the route itself says so
            }
            if (body.is_object() && !is_absent(body, field)) {
                const server_steer_error error(400, path + " cannot be steered: leave out '" + field + "'");
                auto res = std::make_unique<server_http_res>();
                res->status = error.code;
                res->data = safe_json_to_str(json{ { "error", error.to_json() } });
                return res;
            }
        }
        return handler(req);
    };
}

server_http_res_ptr server_steer_router(const server_http_req &) {
    auto res = std::make_unique<server_http_res>();
    const server_steer_error error(501, "a router does not steer: ask one of its models' own servers");
    res->status = error.code;
    res->data = safe_json_to_str(json{ { "error", error.to_json() } });
    return res;
}

json server_steer_parse_object(const std::string & text, const std::string & what) {
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (quoted) {
            i += c == '\\';
            quoted = c != '"';
        } else if (c == '"') {
            quoted = true;
        } else if (c == '[' || c == '{') {
            if (++depth > MAX_DEPTH) {
                bad(what + " is nested too deeply");
            }
        } else if (c == ']' || c == '}') {
            depth--;
        }
    }
    json res;
    try {
        res = json::parse(text);
    } catch (const std::exception &) {
        bad(what + " is not valid JSON");
    }
    if (!res.is_object()) {
        bad(what + " is not a JSON object");
    }
    return res;
}
