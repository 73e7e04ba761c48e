// server-steer-terms.cpp - what a request asks for: terms, schedules, tags, probes and reads.

#include "server-steer-store.h"
#include "server-steer-json.h"
#include "server-steer-tags.h"

#include "chat.h"

#include <cmath>

using namespace server_steer_json;

namespace {

const char * const OPS[6] = { "add", "project", "clamp", "renorm", "floor", "cap" }; // in the order of enum llama_steer_op

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
        term.spec.scope = (int32_t) (it - names.begin()); // in the order of enum llama_steer_scope
        return;
    }
    const size_t dash = scope.find('-');
    term.spec.scope = LLAMA_STEER_SCOPE_RANGE;
    term.spec.last = -1;
    if (dash == std::string::npos || !number_of(scope.substr(0, dash), term.spec.first) ||
        (dash + 1 < scope.size() && !number_of(scope.substr(dash + 1), term.spec.last))) {
        bad("unknown scope " + shown(scope) + ": use all, prompt, response, thinking, answer, or positions such as 5-20 or 0-");
    }
    if (term.spec.last >= 0 && term.spec.last < term.spec.first) {
        bad("scope " + shown(scope) + " ends before it starts");
    }
}

} // namespace

static void parse_schedule(const json & item, const std::string & where, llama_steer_plan_term & res) {
    if (!item.is_object()) {
        bad(where + ": the schedule is " + shown(item) + ": write it as {\"kind\": \"linear\", \"over\": 64, \"floor\": 0.2}");
    }
    check_keys(item, "schedule", where + ": the schedule");
    static const char * const kinds[] = { "constant", "linear", "cosine" };
    const json kind = item.contains("kind") ? item.at("kind") : json(nullptr);
    const int32_t index = kind.is_string() ? index_of(kinds, 3, kind.get<std::string>()) : -1;
    if (index < 0) {
        bad(where + ": unknown schedule " + shown(kind) + ": use constant, linear or cosine");
    }
    res.schedule = index; // in the order of enum llama_steer_schedule
    if (res.schedule == LLAMA_STEER_CONSTANT) {
        if (item.size() > 1) {
            bad(where + ": a constant schedule takes neither over nor floor");
        }
        return;
    }
    int64_t over = 0;
    if (!item.contains("over") || !is_whole(item.at("over"), over) || over < 1 || over > server_steer_most("schedule", "over")) {
        bad(where + string_format(": a schedule needs 'over', a whole number of tokens from 1 to %d", LLAMA_STEER_MAX_OVER));
    }
    res.over = (int32_t) over;
    if (item.contains("floor")) {
        const json & floor = item.at("floor");
        if (!floor.is_number() || !(floor.get<double>() >= 0.0 && floor.get<double>() <= 1.0)) {
            bad(where + ": the floor of the schedule is " + shown(floor) + ": give a part of the strength, from 0 to 1");
        }
        res.floor = floor.get<double>();
    }
}

bool server_steer_request::has_gates() const {
    return std::any_of(terms.begin(), terms.end(), [](const server_steer_term & t) { return t.gate && t.is_active(); });
}

static server_steer_term parse_term(size_t number, const json & item, const std::map<std::string, server_steer_vector_ptr> & vectors, const llama_steer_info & info) {
    const std::string where = "term " + std::to_string(number) + " of steering";
    if (!item.is_object()) {
        bad(where + " is no JSON object");
    }
    check_keys(item, "term", where);
    server_steer_term term;
    term.given = item;
    term.spec.strength = 1.0;
    term.spec.il_first = term.spec.il_last = -1;
    term.spec.stream = LLAMA_STEER_STREAM_ALL;
    if (is_absent(item, "vector")) {
        bad(where + " names no vector");
    }
    term.name = text_of(item.at("vector"), where + ": the vector");
    const auto it = vectors.find(term.name);
    if (it == vectors.end()) {
        bad("no vector " + shown(term.name) + " is loaded: upload it with POST /steering/vectors/NAME");
    }
    term.vector = it->second;

    if (item.contains("strength")) {
        const json & strength = item.at("strength");
        if (!strength.is_number() || !std::isfinite(strength.get<double>())) {
            bad(where + ": the strength of " + shown(term.name) + " is " + shown(strength) + ", not a finite number");
        }
        term.spec.strength = strength.get<double>();
    }
    if (!is_absent(item, "layers")) {
        const json & layers = item.at("layers");
        if (!layers.is_array() || layers.size() != 2) {
            bad(where + ": the layers are " + shown(layers) + ": give the first and the last, from 0");
        }
        term.spec.il_first = small_number(layers.at(0), where + ": the first layer");
        term.spec.il_last = layers.at(1).is_null() ? -1 : small_number(layers.at(1), where + ": the last layer");
        if (term.spec.il_last >= 0 && term.spec.il_last < term.spec.il_first) {
            bad(where + ": the layer window ends before it starts");
        }
    }
    const std::string op = is_absent(item, "op") ? term.vector->op : text_of(item.at("op"), where + ": the op");
    term.spec.op = index_of(OPS, 6, op);
    if (term.spec.op < 0) {
        bad(where + ": unknown op " + shown(op) + ": use add, project, clamp, renorm, floor or cap");
    }
    const bool bounds = term.spec.op == LLAMA_STEER_FLOOR || term.spec.op == LLAMA_STEER_CAP;
    if (is_absent(item, "level") == bounds) {
        bad(where + (bounds ? ": " + op + " needs a level, in units of the strength of " + shown(term.name) : ": op " + op + " takes no level"));
    }
    if (bounds) {
        const json & level = item.at("level");
        if (!level.is_number() || !std::isfinite(level.get<double>())) {
            bad(where + ": the level of " + shown(term.name) + " is " + shown(level) + ", not a finite number");
        }
        term.spec.level = level.get<double>();
    }
    set_scope(term, is_absent(item, "scope") ? term.vector->scope : text_of(item.at("scope"), where + ": the scope"));

    if (!is_absent(item, "stream")) {
        term.spec.stream = small_number(item.at("stream"), where + ": the stream");
        if (term.spec.stream >= info.n_streams) {
            bad(where + string_format(": there is no stream %d, this model has %d", term.spec.stream, info.n_streams));
        }
    }
    if (!is_absent(item, "schedule")) {
        parse_schedule(item.at("schedule"), where, term.spec);
    }
    if (!is_absent(item, "gate")) {
        const std::string name = text_of(item.at("gate"), where + ": the gate");
        const auto found = vectors.find(name);
        if (found == vectors.end()) {
            bad("no gate " + shown(name) + " is loaded: upload it with POST /steering/vectors/NAME");
        }
        term.gate = found->second;
        if (!term.gate->gate) {
            bad(where + ": " + shown(name) + " is a vector, not a gate");
        }
        if (term.spec.scope != LLAMA_STEER_SCOPE_RESPONSE && term.spec.scope != LLAMA_STEER_SCOPE_THINKING && term.spec.scope != LLAMA_STEER_SCOPE_ANSWER) {
            bad(where + ": " + shown(term.name) + " has a gate, which is decided at the end of the prompt: its scope has to be response, thinking or answer");
        }
        if (info.last_layer_outputs_only && term.gate->layers[0] == info.n_layer - 1) {
            bad(where + string_format(": the gate %s looks at layer %d, which holds output tokens only in this architecture", shown(name).c_str(), term.gate->layers[0]));
        }
    }
    bool inside = false;
    for (size_t i = 0; i < term.vector->n(); ++i) {
        const int32_t il = term.vector->layers[i];
        inside = inside || (il >= term.spec.il_first && (term.spec.il_last < 0 || il <= term.spec.il_last));
        if (term.spec.stream >= 0 && term.vector->sites[i] != LLAMA_STEER_RESID_POST) {
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
    const auto covers = [](const server_steer_term & t, int32_t il) { return il >= t.spec.il_first && (t.spec.il_last < 0 || il <= t.spec.il_last); };
    for (const auto & t : terms) {
        for (const auto & other : terms) {
            const bool apart = t.spec.stream >= 0 && other.spec.stream >= 0 && t.spec.stream != other.spec.stream;
            if (t.spec.op != LLAMA_STEER_RENORM || other.spec.op == LLAMA_STEER_RENORM || t.spec.strength == 0.0 || other.spec.strength == 0.0 || apart) {
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

server_steer_terms server_steer_store::parse_terms(const json & value) {
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
        res.push_back(parse_term(i + 1, value.at(i), vectors, info));
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
    const size_t most = (size_t) server_steer_most("tags", key);
    const json & tags = value.at(key);
    if (!tags.is_array()) {
        res.push_back(text_of(tags, what));
    }
    for (size_t i = 0; tags.is_array() && i <= most && i < tags.size(); ++i) {
        res.push_back(text_of(tags.at(i), what));
    }
    if (res.size() > most || std::any_of(res.begin(), res.end(), [](const std::string & tag) { return tag.empty() || tag.size() > 256; })) {
        bad(what + " has to be 1 to 256 bytes long, and a list of at most " + std::to_string(most));
    }
    return res;
}

static void parse_tags(const json & value, server_steer_tags & tags) {
    if (!value.is_object()) {
        bad("steering_tags is " + shown(value) + ", not an object with open and close");
    }
    check_keys(value, "tags", "steering_tags");
    tags.known = true;
    if (value.contains("open") || value.contains("close")) {
        tags.open = parse_tag(value, "open");
        tags.close = parse_tag(value, "close");
    }
    if (value.contains("tool_open") || value.contains("tool_close")) {
        tags.tool_open = parse_tag(value, "tool_open");
        tags.tool_close = parse_tag(value, "tool_close");
        tags.all_tools = false;
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

bool server_steer_thinks_untold(const common_chat_templates * templates, bool has_tags) {
    if (has_tags) {
        return false;
    }
    std::string text = common_chat_templates_source(templates);
    for (char & c : text) {
        c = c >= 'A' && c <= 'Z' ? (char) (c - 'A' + 'a') : c;
    }
    for (const char * word : { "think", "thought", "reason" }) {
        if (text.find(word) != std::string::npos) {
            return true;
        }
    }
    return false;
}

static server_steer_tags template_tags(const json & data, const common_chat_templates * templates) {
    server_steer_tags tags;
    const std::string open = json_value(data, "reasoning_budget_start_tag", std::string());
    if (!open.empty()) {
        tags.open.push_back(open);
    }
    tags.close = json_value(data, "reasoning_budget_end_tags", std::vector<std::string>());
    const std::string close = json_value(data, "reasoning_budget_end_tag", std::string()); // of older versions
    if (!close.empty()) {
        tags.close.push_back(close);
    }
    tags.known = !server_steer_thinks_untold(templates, !tags.open.empty() || !tags.close.empty());
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

// All that can be said of terms before their prompt is known: the planner is asked for a plan.
void server_steer_store::check_terms(const server_steer_request & request, bool raw) const {
    for (const auto & term : request.terms) {
        if (!term.has_phase()) {
            continue;
        }
        const std::string scope = std::string("scope ") + (term.spec.scope == LLAMA_STEER_SCOPE_THINKING ? "'thinking'" : "'answer'") + " of " + shown(term.name);
        if (drafts) {
            bad(scope + " cannot be followed with speculative decoding: use response, or start the server without a draft model");
        }
        if (raw && !request.tags.known) {
            bad(scope + " needs steering_tags on a route without a chat template, such as {\"open\": \"<think>\", \"close\": \"</think>\"}");
        }
    }
    server_steer_plan_tags tags(request.tags);
    const auto native = tags.native();
    std::vector<llama_steer_plan_term> specs;
    for (const auto & term : request.terms) {
        specs.push_back(term.spec);
        specs.back().name = term.name.c_str();
        specs.back().vector = &term.vector->native;
    }
    llama_steer_plan * plan = llama_steer_plan_new((int32_t) specs.size(), specs.data(), 0, &native);
    if (!plan) {
        bad(llama_steer_plan_error());
    }
    llama_steer_plan_free(plan);
}

server_steer_request_ptr server_steer_store::parse(const json & data, const std::string & id, const common_chat_templates * templates, std::shared_ptr<server_steer_ticket> & ticket) {
    const bool steered = !is_absent(data, "steering");
    const bool named = !is_absent(data, "request_id");
    const bool probed = !is_absent(data, "steering_probe");
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
    if (templates) {
        res->tags = template_tags(data, templates);
    }
    if (!is_absent(data, "steering_tags")) {
        parse_tags(data.at("steering_tags"), res->tags);
    }
    check_terms(*res, templates == nullptr);
    if (res->has_gates() && (json_value(data, "n", 1) > 1 || json_value(data, "n_cmpl", 1) > 1)) {
        bad("several completions of one prompt cannot be gated: send a request for each");
    }
    if (probed) {
        const json & names = data.at("steering_probe");
        const size_t most = (size_t) server_steer_most("request", "steering_probe");
        if (!names.is_array() || names.size() > most) {
            bad("steering_probe is " + shown(names) + string_format(", not a list of at most %zu vector names", most));
        }
        if (names.size() > 0 && !unsupported.empty()) {
            bad(unsupported);
        }
        std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < names.size(); ++i) {
            const std::string name = text_of(names.at(i), "a name in steering_probe");
            const auto it = vectors.find(name);
            if (it == vectors.end()) {
                bad("no vector " + shown(name) + " is loaded, so it cannot be probed");
            }
            res->probe_names.push_back(name);
            res->probes.push_back(it->second);
        }
    }
    res->id = named ? text_of(data.at("request_id"), "request_id") : id;
    res->named = steered || named || probed;
    ticket = reserve(*res);
    return res;
}

server_steer_request server_steer_store::parse_special(const json & body, const std::string & id, std::shared_ptr<server_steer_ticket> & ticket) {
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
    check_terms(res, true);
    res.id = is_absent(body, "request_id") ? id : text_of(body.at("request_id"), "request_id");
    ticket = reserve(res);
    return res;
}

std::shared_ptr<const server_steer_read_spec> server_steer_store::parse_read(const json & body, int32_t n_ctx) const {
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
    } else if (positions.is_array() && !positions.empty() && positions.size() <= server_steer_most("read", "positions")) {
        res->kind = server_steer_read_spec::LIST;
        for (size_t i = 0; i < positions.size(); ++i) {
            const json & p = positions.at(i);
            int64_t number = 0;
            if (!p.is_number_integer()) {
                bad("position " + shown(p) + " is not a whole number");
            }
            if (!is_whole(p, number) || number >= n_ctx || number < -(int64_t) n_ctx) {
                bad("position " + shown(p) + string_format(" lies in no text: the context of a request has %d tokens", n_ctx));
            }
            res->list.push_back(number);
        }
        std::sort(res->list.begin(), res->list.end());
        res->list.erase(std::unique(res->list.begin(), res->list.end()), res->list.end());
        if (res->list == std::vector<int64_t>{ -1 }) {
            res->kind = server_steer_read_spec::LAST;
        }
    } else {
        bad("positions are " + shown(positions) + ": use last, all, mean, response, response_mean or a list");
    }
    const int32_t last = info.n_layer - 1;
    const bool no_last = info.last_layer_outputs_only && res->kind != server_steer_read_spec::LAST;
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
