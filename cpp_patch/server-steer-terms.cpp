// server-steer-terms.cpp - what a request asks for: terms, schedules, tags, probes and reads.

#include "server-steer-json.h"

#include <cmath>

using namespace server_steer_json;

namespace {

constexpr int32_t MAX_OVER = 4096; // tokens of a schedule

const char * const OPS[4] = { "add", "project", "clamp", "renorm" };

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

} // namespace

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
