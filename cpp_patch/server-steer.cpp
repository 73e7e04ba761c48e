// server-steer.cpp - requests, terms and slots.

#include "server-steer.h"

#include "common.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace {

constexpr size_t MAX_VECTORS      = 1024;
constexpr size_t MAX_VECTOR_BYTES = (size_t) 4 << 30;
constexpr size_t MAX_TERMS        = 64; // one bit each in the set of active terms
constexpr size_t MAX_BODY         = (size_t) 64 << 20;
constexpr int32_t MAX_OVER        = 4096; // tokens of a schedule

const char * const SITES[LLAMA_STEER_SITE_COUNT] = { "resid_post", "attn_out", "ffn_out" };
const char * const OPS[4] = { "add", "project", "clamp", "renorm" };

std::string g_folder;
std::string g_default;

[[noreturn]] void bad(const std::string & message) {
    throw server_steer_error(400, message);
}

std::string shown(const std::string & text) {
    return "'" + (text.size() <= 60 ? text : text.substr(0, 57) + "...") + "'";
}

std::string shown(const json & value) {
    return shown(value.dump_safe());
}

bool is_name(const std::string & name, const char * more, size_t most) {
    const auto ok = [&](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || strchr(more, c); };
    return !name.empty() && name.size() <= most && std::all_of(name.begin(), name.end(), [&](char c) { return c != '\0' && ok(c); });
}

void check_vector_name(const std::string & name) {
    if (!is_name(name, "._-", 64) || strchr("._-", name[0])) {
        bad(shown(name) + " is not a vector name: use 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit");
    }
}

int32_t index_of(const char * const * names, int32_t n, const std::string & name) {
    for (int32_t i = 0; i < n; ++i) {
        if (name == names[i]) {
            return i;
        }
    }
    return -1;
}

// digits only, at most 9 of them
bool number_of(const std::string & text, llama_pos & value) {
    if (text.empty() || text.size() > 9 || !std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; })) {
        return false;
    }
    value = std::stoi(text);
    return true;
}

void set_scope(server_steer_term & term, const std::string & scope) {
    static const std::vector<std::string> names = { "all", "prompt", "response", "thinking", "answer" };
    const auto it = std::find(names.begin(), names.end(), scope);
    if (it != names.end()) {
        term.scope = (server_steer_term::scope_t) (it - names.begin());
        return;
    }
    const size_t dash = scope.find('-');
    term.scope = server_steer_term::RANGE;
    term.last  = -1;
    if (dash == std::string::npos || !number_of(scope.substr(0, dash), term.first) ||
            (dash + 1 < scope.size() && !number_of(scope.substr(dash + 1), term.last))) {
        bad("unknown scope " + shown(scope) + ": use all, prompt, response, thinking, answer, or positions such as 5-20 or 0-");
    }
    if (term.last >= 0 && term.last < term.first) {
        bad("scope " + shown(scope) + " ends before it starts");
    }
}

std::string text_of(const json & value, const std::string & what) {
    if (!value.is_string()) {
        bad(what + " is " + shown(value) + ", not a text");
    }
    return value.get<std::string>();
}

int32_t small_number(const json & value, const std::string & what) {
    if (!value.is_number_integer() || value.get<int64_t>() < 0 || value.get<int64_t>() > 1000000) {
        bad(what + " is " + shown(value) + ", not a whole number from 0");
    }
    return (int32_t) value.get<int64_t>();
}

bool is_absent(const json & data, const char * key) {
    return !data.contains(key) || data.at(key).is_null();
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

// ---- terms ----

bool server_steer_request::has_phases() const {
    return std::any_of(terms.begin(), terms.end(), [](const server_steer_term & t) {
        return t.strength != 0.0 && (t.scope == server_steer_term::THINKING || t.scope == server_steer_term::ANSWER);
    });
}

double server_steer_schedule::factor(int32_t n) const {
    if (kind == CONSTANT || n <= 0) {
        return 1.0;
    }
    if (n >= over) {
        return floor;
    }
    const double part = (double) n/over;
    const double left = kind == LINEAR ? 1.0 - part : 0.5*(1.0 + std::cos(3.14159265358979323846*part));
    return floor + (1.0 - floor)*left;
}

static server_steer_schedule parse_schedule(const json & item, const std::string & where) {
    server_steer_schedule res;
    if (!item.is_object()) {
        bad(where + ": the schedule is " + shown(item) + ": write it as {\"kind\": \"linear\", \"over\": 64, \"floor\": 0.2}");
    }
    for (const auto & entry : item.items()) {
        static const std::set<std::string> keys = { "kind", "over", "floor" };
        if (!keys.count(entry.key())) {
            bad(where + ": the schedule has the unknown key " + shown(entry.key()));
        }
    }
    static const char * const kinds[] = { "constant", "linear", "cosine" };
    const json kind = item.contains("kind") ? item.at("kind") : json(nullptr);
    const int32_t index = kind.is_string() ? index_of(kinds, 3, kind.get<std::string>()) : -1;
    if (index < 0) {
        bad(where + ": unknown schedule " + shown(kind) + ": use constant, linear or cosine");
    }
    res.kind = (server_steer_schedule::kind_t) index;
    if (res.kind == server_steer_schedule::CONSTANT) {
        if (item.size() > 1) {
            bad(where + ": a constant schedule takes neither over nor floor");
        }
        return res;
    }
    if (is_absent(item, "over") || !item.at("over").is_number_integer() || item.at("over").get<int64_t>() < 1 || item.at("over").get<int64_t>() > MAX_OVER) {
        bad(where + string_format(": a schedule needs 'over', a whole number of tokens from 1 to %d", MAX_OVER));
    }
    res.over = (int32_t) item.at("over").get<int64_t>();
    if (!is_absent(item, "floor")) {
        const json & floor = item.at("floor");
        if (!floor.is_number() || !(floor.get<double>() >= 0.0 && floor.get<double>() <= 1.0)) {
            bad(where + ": the floor of the schedule is " + shown(floor) + ": give a part of the strength, from 0 to 1");
        }
        res.floor = floor.get<double>();
    }
    return res;
}

bool server_steer_request::has_gates() const {
    return std::any_of(terms.begin(), terms.end(), [](const server_steer_term & t) { return t.gate && t.strength != 0.0; });
}

static server_steer_term parse_term(size_t number, const json & item, const std::map<std::string, server_steer_vector_ptr> & store, const llama_steer_info & info) {
    const std::string where = "term " + std::to_string(number) + " of steering";
    if (!item.is_object()) {
        bad(where + " is no JSON object");
    }
    for (const auto & entry : item.items()) {
        static const std::set<std::string> keys = { "vector", "strength", "layers", "op", "scope", "stream", "schedule", "gate" };
        if (!keys.count(entry.key())) {
            bad(where + " has the unknown key " + shown(entry.key()));
        }
    }
    server_steer_term term;
    term.given = item;
    if (is_absent(item, "vector")) {
        bad(where + " names no vector");
    }
    term.name = text_of(item.at("vector"), where + ": the vector");
    const auto it = store.find(term.name);
    if (it == store.end()) {
        bad("no vector " + shown(term.name) + " is loaded: upload it with POST /steering/vectors/NAME");
    }
    term.vector = it->second;

    if (!is_absent(item, "strength")) {
        const json & strength = item.at("strength");
        if (!strength.is_number() || !std::isfinite(strength.get<double>())) {
            bad(where + ": the strength of " + shown(term.name) + " is " + shown(strength) + ", not a finite number");
        }
        term.strength = strength.get<double>();
    }
    if (!is_absent(item, "layers")) {
        const json & layers = item.at("layers");
        if (!layers.is_array() || layers.size() != 2) {
            bad(where + ": the layers are " + shown(layers) + ": give the first and the last, from 0");
        }
        term.il_first = small_number(layers.at(0), where + ": the first layer");
        term.il_last  = layers.at(1).is_null() ? -1 : small_number(layers.at(1), where + ": the last layer");
        if (term.il_last >= 0 && term.il_last < term.il_first) {
            bad(where + ": the layer window ends before it starts");
        }
    }
    const std::string op = is_absent(item, "op") ? term.vector->op : text_of(item.at("op"), where + ": the op");
    term.op = index_of(OPS, 4, op);
    if (term.op < 0) {
        bad(where + ": unknown op " + shown(op) + ": use add, project, clamp or renorm");
    }
    set_scope(term, is_absent(item, "scope") ? term.vector->scope : text_of(item.at("scope"), where + ": the scope"));

    if (!is_absent(item, "stream")) {
        term.stream = small_number(item.at("stream"), where + ": the stream");
        if (term.stream >= info.n_streams) {
            bad(where + string_format(": there is no stream %d, this model has %d", term.stream, info.n_streams));
        }
    }
    if (!is_absent(item, "schedule")) {
        term.schedule = parse_schedule(item.at("schedule"), where);
        if (term.schedule.kind != server_steer_schedule::CONSTANT && term.scope == server_steer_term::PROMPT) {
            bad(where + ": a schedule counts tokens of the response, so " + shown(term.name) + " cannot have one with scope prompt");
        }
    }
    if (!is_absent(item, "gate")) {
        const std::string name = text_of(item.at("gate"), where + ": the gate");
        const auto found = store.find(name);
        if (found == store.end()) {
            bad("no gate " + shown(name) + " is loaded: upload it with POST /steering/vectors/NAME");
        }
        term.gate = found->second;
        if (!term.gate->gate) {
            bad(where + ": " + shown(name) + " is a vector, not a gate");
        }
        if (term.scope != server_steer_term::RESPONSE && term.scope != server_steer_term::THINKING && term.scope != server_steer_term::ANSWER) {
            bad(where + ": " + shown(term.name) + " has a gate, which is decided at the end of the prompt: its scope has to be response, thinking or answer");
        }
        if (info.last_layer_outputs_only && term.gate->layers[0] == info.n_layer - 1) {
            bad(where + string_format(": the gate %s looks at layer %d, which holds output tokens only in this architecture", shown(name).c_str(), term.gate->layers[0]));
        }
    }
    bool inside = false;
    for (size_t i = 0; i < term.vector->n(); ++i) {
        const int32_t il = term.vector->layers[i];
        inside = inside || (il >= term.il_first && (term.il_last < 0 || il <= term.il_last));
        if (term.stream >= 0 && term.vector->sites[i] != LLAMA_STEER_RESID_POST) {
            bad(where + ": " + shown(term.name) + " does not act on streams, so none can be chosen");
        }
    }
    if (!inside) {
        bad(where + ": its layers hold none of the layers of " + shown(term.name));
    }
    return term;
}

// Where a term restores the length, no other op may act: what comes first would not be defined.
static void check_renorm(const server_steer_terms & terms) {
    const auto covers = [](const server_steer_term & t, int32_t il) { return il >= t.il_first && (t.il_last < 0 || il <= t.il_last); };
    for (const auto & t : terms) {
        for (const auto & other : terms) {
            const bool apart = t.stream >= 0 && other.stream >= 0 && t.stream != other.stream;
            if (t.op != LLAMA_STEER_RENORM || other.op == LLAMA_STEER_RENORM || t.strength == 0.0 || other.strength == 0.0 || apart) {
                continue;
            }
            for (size_t i = 0; i < t.vector->n(); ++i) {
                for (size_t k = 0; k < other.vector->n(); ++k) {
                    const int32_t il = t.vector->layers[i];
                    if (il == other.vector->layers[k] && t.vector->sites[i] == other.vector->sites[k] && covers(t, il) && covers(other, il)) {
                        bad(shown(t.name) + string_format(" restores the length at layer %d, where ", il) + shown(other.name) +
                            " acts with another op: give both renorm, or layers of their own");
                    }
                }
            }
        }
    }
}

server_steer_terms server_steer::parse_terms(const json & value) {
    if (!value.is_array()) {
        bad("steering is " + shown(value) + ", not a list of terms: the text form is parsed by the client");
    }
    if (value.size() > MAX_TERMS) {
        bad(string_format("steering has %zu terms, %zu are the limit", value.size(), MAX_TERMS));
    }
    if (value.size() > 0 && !unsupported.empty()) {
        bad(unsupported);
    }
    server_steer_terms res;
    std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < value.size(); ++i) {
        res.push_back(parse_term(i + 1, value.at(i), store, info));
    }
    check_renorm(res);
    return res;
}

// one tag, or a list of them
static std::vector<std::string> parse_tag(const json & value, const char * key) {
    std::vector<std::string> res;
    if (is_absent(value, key)) {
        return res;
    }
    const std::string what = std::string("the ") + key + " tag";
    const json & tags = value.at(key);
    if (!tags.is_array()) {
        res.push_back(text_of(tags, what));
    }
    for (size_t i = 0; tags.is_array() && i < std::min<size_t>(tags.size(), 17); ++i) {
        res.push_back(text_of(tags.at(i), what));
    }
    if (res.size() > 16 || std::any_of(res.begin(), res.end(), [](const std::string & tag) { return tag.empty() || tag.size() > 256; })) {
        bad(what + " has to be 1 to 256 bytes long, and a list of at most 16");
    }
    return res;
}

static void parse_tags(const json & value, server_steer_tags & tags) {
    if (!value.is_object()) {
        bad("steering_tags is " + shown(value) + ", not an object with open and close");
    }
    for (const auto & entry : value.items()) {
        static const std::set<std::string> keys = { "open", "close", "tool_open", "tool_close" };
        if (!keys.count(entry.key())) {
            bad("steering_tags has the unknown key " + shown(entry.key()));
        }
    }
    const auto open = parse_tag(value, "open");
    if (open.size() > 1) {
        bad("steering_tags names more than one tag that opens thinking");
    }
    tags.known = true;
    if (value.contains("open") || value.contains("close")) {
        tags.open  = open.empty() ? "" : open[0];
        tags.close = parse_tag(value, "close");
    }
    if (value.contains("tool_open") || value.contains("tool_close")) {
        tags.tool_open  = parse_tag(value, "tool_open");
        tags.tool_close = parse_tag(value, "tool_close");
        tags.all_tools  = false;
    }
}

// what ends a tool call that begins with this; empty: nothing we know, so it lasts to the end
static std::string end_of_tool(const std::string & begin) {
    const size_t at = begin.rfind("begin");
    if (at != std::string::npos) {
        return begin.substr(0, at) + "end" + begin.substr(at + 5);
    }
    if (begin.size() > 2 && begin[0] == '<' && begin[1] != '/') {
        return "</" + begin.substr(1);
    }
    return "";
}

static server_steer_tags template_tags(const json & data) {
    server_steer_tags tags;
    tags.known = true;
    tags.open  = json_value(data, "reasoning_budget_start_tag", std::string());
    tags.close = json_value(data, "reasoning_budget_end_tags", std::vector<std::string>());
    tags.generation_prompt = json_value(data, "generation_prompt", std::string());

    const json tools = json_value(data, "tools", json::array());
    if (!tools.is_array() || tools.empty()) {
        return tags;
    }
    if (!is_absent(data, "tool_choice")) {
        const json & choice = data.at("tool_choice");
        tags.all_tools = choice.is_object() || (choice.is_string() && choice.get<std::string>() == "required");
    }
    const json triggers = json_value(data, "grammar_triggers", json::array());
    for (size_t i = 0; i < triggers.size(); ++i) {
        // a model may break the line elsewhere than its template does
        const std::string begin = string_strip(json_value(triggers.at(i), "value", std::string()));
        if (!begin.empty()) {
            tags.tool_open.push_back(begin);
            const std::string end = end_of_tool(begin);
            if (!end.empty()) {
                tags.tool_close.push_back(end);
            }
        }
    }
    return tags;
}

void server_steer::check_phases(const server_steer_terms & terms, const server_steer_tags & tags) const {
    for (const auto & term : terms) {
        const bool thinking = term.scope == server_steer_term::THINKING;
        if (term.strength == 0.0 || (!thinking && term.scope != server_steer_term::ANSWER)) {
            continue;
        }
        const std::string scope = std::string("scope ") + (thinking ? "'thinking'" : "'answer'") + " of " + shown(term.name);
        if (drafts) {
            bad(scope + " cannot be followed with speculative decoding: use response, or start the server without a draft model");
        }
        if (!tags.known) {
            bad(scope + " needs steering_tags on a route without a chat template, such as {\"open\": \"<think>\", \"close\": \"</think>\"}");
        }
        if (thinking && tags.open.empty() && tags.close.empty()) {
            bad(scope + " needs a model with thinking tags: use response or all");
        }
    }
}

server_steer_request_ptr server_steer::parse(const json & data, const std::string & id, bool templated, std::shared_ptr<server_steer_ticket> & ticket) {
    const bool steered = !is_absent(data, "steering");
    const bool named   = !is_absent(data, "request_id");
    const bool probed  = !is_absent(data, "steering_probe");
    auto res = std::make_shared<server_steer_request>();
    if (steered) {
        res->terms = parse_terms(data.at("steering"));
    } else {
        std::lock_guard<std::mutex> lock(mutex);
        res->terms = defaults;
    }
    if (!steered && !named && !probed && res->terms.empty() && is_absent(data, "steering_tags")) {
        return nullptr;
    }
    if (templated) {
        res->tags = template_tags(data);
    }
    if (!is_absent(data, "steering_tags")) {
        parse_tags(data.at("steering_tags"), res->tags);
    }
    check_phases(res->terms, res->tags);
    if (res->has_gates() && (json_value(data, "n", 1) > 1 || json_value(data, "n_cmpl", 1) > 1)) {
        bad("several completions of one prompt cannot be gated: send a request for each");
    }
    if (probed) {
        const json & names = data.at("steering_probe");
        if (!names.is_array() || names.size() > 16) {
            bad("steering_probe is " + shown(names) + ", not a list of at most 16 vector names");
        }
        if (names.size() > 0 && !unsupported.empty()) {
            bad(unsupported);
        }
        std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < names.size(); ++i) {
            const std::string name = text_of(names.at(i), "a name in steering_probe");
            const auto it = store.find(name);
            if (it == store.end()) {
                bad("no vector " + shown(name) + " is loaded, so it cannot be probed");
            }
            res->probe_names.push_back(name);
            res->probes.push_back(it->second);
        }
    }
    res->id    = named ? text_of(data.at("request_id"), "request_id") : id;
    res->named = steered || named || probed;
    ticket = reserve(*res);
    return res;
}

server_steer_request server_steer::parse_special(const json & body, const std::string & id, std::shared_ptr<server_steer_ticket> & ticket) {
    server_steer_request res;
    if (!unsupported.empty()) {
        bad(unsupported);
    }
    if (!is_absent(body, "steering")) {
        res.terms = parse_terms(body.at("steering"));
    }
    if (!is_absent(body, "steering_tags")) {
        parse_tags(body.at("steering_tags"), res.tags);
    }
    check_phases(res.terms, res.tags);
    res.id = is_absent(body, "request_id") ? id : text_of(body.at("request_id"), "request_id");
    ticket = reserve(res);
    return res;
}

void server_steer::refuse(const json & body, const char * what) {
    for (const char * key : { "steering", "steering_probe", "steering_tags" }) {
        if (body.is_object() && !is_absent(body, key)) {
            bad(std::string(what) + " cannot be steered: leave out '" + key + "'");
        }
    }
}

std::shared_ptr<const server_steer_read_spec> server_steer::parse_read(const json & body) const {
    auto res = std::make_shared<server_steer_read_spec>();
    if (!is_absent(body, "site")) {
        const std::string site = text_of(body.at("site"), "the site");
        res->site = index_of(SITES, LLAMA_STEER_SITE_COUNT, site);
        if (res->site < 0 || !info.sites[res->site]) {
            bad("site " + shown(site) + " cannot be read in " + identity.architecture);
        }
    }
    if (!is_absent(body, "stream")) {
        const std::string stream = text_of(body.at("stream"), "stream");
        if (stream != "mean" && stream != "all") {
            bad("unknown stream " + shown(stream) + ": read the mean, or all");
        }
        res->streams = stream == "all" && res->site == LLAMA_STEER_RESID_POST && info.n_streams > 1;
    }
    const json positions = json_value(body, "positions", json("last"));
    if (positions.is_string()) {
        static const char * const kinds[] = { "last", "all", "mean", "response", "response_mean" };
        const int32_t kind = index_of(kinds, 5, positions.get<std::string>());
        if (kind < 0) {
            bad("unknown positions " + shown(positions) + ": use last, all, mean, response, response_mean or a list");
        }
        res->kind = (server_steer_read_spec::kind_t) kind;
    } else if (positions.is_array() && !positions.empty() && positions.size() <= 1000000) {
        res->kind = server_steer_read_spec::LIST;
        for (size_t i = 0; i < positions.size(); ++i) {
            const json & p = positions.at(i);
            if (!p.is_number_integer()) {
                bad("position " + shown(p) + " is not a whole number");
            }
            res->list.push_back(p.get<int64_t>());
        }
        if (res->list == std::vector<int64_t>{ -1 }) {
            res->kind = server_steer_read_spec::LAST;
        }
    } else {
        bad("positions are " + shown(positions) + ": use last, all, mean, response, response_mean or a list");
    }
    const int32_t last = info.n_layer - 1;
    const bool    no_last = info.last_layer_outputs_only && res->kind != server_steer_read_spec::LAST;
    if (is_absent(body, "layers")) {
        for (int32_t il = 0; il < info.n_layer - (no_last ? 1 : 0); ++il) {
            res->layers.push_back(il);
        }
        return res;
    }
    const json & layers = body.at("layers");
    if (!layers.is_array() || layers.empty() || layers.size() > (size_t) info.n_layer) {
        bad("layers are " + shown(layers) + ": give a list of block indices");
    }
    std::set<int32_t> chosen;
    for (size_t i = 0; i < layers.size(); ++i) {
        const int32_t il = small_number(layers.at(i), "a layer");
        if (il > last) {
            bad(string_format("layer %d does not exist: this model has layers 0 to %d", il, last));
        }
        if (no_last && il == last) {
            bad(string_format("layer %d holds output tokens only in this architecture: read it at the last position, or leave it out", il));
        }
        chosen.insert(il);
    }
    res->layers.assign(chosen.begin(), chosen.end());
    return res;
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
