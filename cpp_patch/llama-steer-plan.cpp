// llama-steer-plan.cpp - see llama-steer-plan.h. Nothing but the C++ library is needed here.

#include "llama-steer-plan.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

thread_local std::string last_error = "no error";

[[noreturn]] void bad(const char * text, ...) {
    char buf[512];
    va_list args;
    va_start(args, text);
    vsnprintf(buf, sizeof(buf), text, args);
    va_end(args);
    throw std::invalid_argument(buf);
}

// Run the body of a call: no exception crosses the C boundary.
template <typename F>
bool guarded(F && body) {
    try {
        body();
        return true;
    } catch (const std::bad_alloc &) {
        last_error = "out of memory";
    } catch (const std::exception & e) {
        last_error = e.what();
    }
    return false;
}

// Follows the text of a response through thinking and tool calls, by the template's own tags.
struct phases {
    std::vector<std::string> open, close, tool_open, tool_close;
    bool known = false;
    bool all_tools = false;
    bool thinking = false;
    bool tool = false;
    std::string tail; // text that could be the beginning of a tag

    static std::vector<std::string> copied(const char * const * tags, int32_t n, const char * what) {
        std::vector<std::string> res;
        for (int32_t i = 0; i < n; ++i) {
            if (!tags || !tags[i] || !*tags[i]) {
                bad("a tag that %s is empty", what);
            }
            res.emplace_back(tags[i]);
        }
        return res;
    }

    explicit phases(const llama_steer_tags * tags) {
        if (!tags) {
            return;
        }
        known = tags->known;
        all_tools = tool = tags->all_tools;
        open = copied(tags->open, tags->n_open, "opens thinking");
        close = copied(tags->close, tags->n_close, "closes thinking");
        tool_open = copied(tags->tool_open, tags->n_tool_open, "opens a tool call");
        tool_close = copied(tags->tool_close, tags->n_tool_close, "closes a tool call");

        const std::string begin = tags->generation_prompt ? tags->generation_prompt : last_tag(tags->prompt_end);
        feed(begin, false);
        if (open.empty() && !close.empty()) { // a template that opens thinking without a tag
            thinking = std::none_of(close.begin(), close.end(), [&](const std::string & tag) { return begin.find(tag) != std::string::npos; });
        }
    }

    // the tag that a text ends with, white space aside; "" if there is none
    std::string last_tag(const char * text) const {
        std::string end = text ? text : "";
        end.erase(end.find_last_not_of(" \t\r\n") + 1);
        std::string best;
        for (const auto * tags : { &open, &close }) {
            for (const auto & tag : *tags) {
                std::string bare = tag;
                bare.erase(bare.find_last_not_of(" \t\r\n") + 1);
                if (bare.size() > 0 && end.size() >= bare.size() && end.compare(end.size() - bare.size(), bare.size(), bare) == 0 && tag.size() > best.size()) {
                    best = tag;
                }
            }
        }
        return best;
    }

    bool tracks() const { return !open.empty() || !close.empty() || !tool_open.empty(); }

    void feed(const std::string & piece, bool response) {
        const size_t seen = tail.size();
        tail += piece;
        size_t best = 0; // end of the last tag that ends within the piece
        size_t longest = 0;
        const auto look = [&](const std::vector<std::string> & tags, bool & phase, bool value) {
            for (const auto & tag : tags) {
                longest = std::max(longest, tag.size());
                const size_t at = tail.rfind(tag);
                if (at != std::string::npos && at + tag.size() > seen && at + tag.size() >= best) {
                    best = at + tag.size();
                    phase = value;
                }
            }
        };
        look(open, thinking, true);
        look(close, thinking, false);
        if (response && !all_tools) {
            best = 0;
            look(tool_open, tool, true);
            look(tool_close, tool, false);
        }
        if (tail.size() > longest) {
            tail.erase(0, tail.size() - longest);
        }
    }
};

bool decays(const llama_steer_plan_term & t) {
    return t.strength != 0.0 && t.schedule != LLAMA_STEER_CONSTANT;
}

// tokens for which a schedule holds a strength
int32_t step_of(const llama_steer_plan_term & t) {
    return (t.over + LLAMA_STEER_MAX_STEPS - 1) / LLAMA_STEER_MAX_STEPS;
}

// What is left of a strength where response token n is decided.
double factor(const llama_steer_plan_term & t, int32_t n) {
    if (t.schedule == LLAMA_STEER_CONSTANT || n <= 0) {
        return 1.0;
    }
    if (n >= t.over) {
        return t.floor;
    }
    const double part = (double) (n - n % step_of(t)) / t.over;
    const double left = t.schedule == LLAMA_STEER_LINEAR ? 1.0 - part : 0.5 * (1.0 + std::cos(3.14159265358979323846 * part));
    return t.floor + (1.0 - t.floor) * left;
}

void check(const llama_steer_plan_term & t, const phases & ph) {
    const char * name = t.name ? t.name : "the vector";
    if (!std::isfinite(t.strength)) {
        bad("the strength of %.80s is not a finite number", name);
    }
    if (t.op < LLAMA_STEER_ADD || t.op > LLAMA_STEER_CAP) {
        bad("op %d of %.80s does not exist", t.op, name);
    }
    if (t.op == LLAMA_STEER_PROJECT && !(t.strength >= LLAMA_STEER_MIN_PROJECT && t.strength <= LLAMA_STEER_MAX_PROJECT)) {
        bad("the strength of %.80s is %g: project takes %g to %g (1 removes the component, 2 reflects it)", name, t.strength,
            LLAMA_STEER_MIN_PROJECT, LLAMA_STEER_MAX_PROJECT);
    }
    const bool bounds = t.op == LLAMA_STEER_FLOOR || t.op == LLAMA_STEER_CAP;
    if (bounds && !(t.strength >= 0.0 && t.strength <= 1.0)) {
        bad("the strength of %.80s is %g: %s takes 0 to 1 (1 lets nothing past its level)", name, t.strength, t.op == LLAMA_STEER_FLOOR ? "floor" : "cap");
    }
    if (!std::isfinite(t.level) || (!bounds && t.level != 0.0)) {
        bad("the level of %.80s is %g: floor and cap take a finite number, other ops none", name, t.level);
    }
    if (bounds && t.vector && t.vector->n_columns > 0) {
        bad("%.80s has columns, which have no floor or cap: take a vector of plain directions", name);
    }
    for (int32_t i = 0; t.vector && i < t.vector->n_columns; ++i) {
        if (!(std::fabs(t.strength * t.vector->columns[i].gain) <= LLAMA_STEER_MAX_DOSE)) {
            bad("strength %g of %.80s is too large at layer %d", t.strength, name, t.vector->columns[i].layer);
        }
    }
    for (int32_t i = 0; t.op != LLAMA_STEER_PROJECT && t.vector && i < t.vector->n; ++i) {
        if (!(std::fabs((bounds ? t.level : t.strength) * t.vector->scales[i]) <= LLAMA_STEER_MAX_DOSE)) {
            bad("%s %g of %.80s is too large at layer %d: a dose of %g is the limit", bounds ? "level" : "strength", bounds ? t.level : t.strength, name,
                t.vector->layers[i], LLAMA_STEER_MAX_DOSE);
        }
    }
    if (t.scope < LLAMA_STEER_SCOPE_ALL || t.scope > LLAMA_STEER_SCOPE_RANGE) {
        bad("scope %d of %.80s does not exist", t.scope, name);
    }
    if (t.scope == LLAMA_STEER_SCOPE_RANGE && (t.first < 0 || (t.last != -1 && t.last < t.first))) {
        bad("the positions %d to %d of %.80s are not a range", t.first, t.last, name);
    }
    if (t.schedule < LLAMA_STEER_CONSTANT || t.schedule > LLAMA_STEER_COSINE) {
        bad("schedule %d of %.80s does not exist", t.schedule, name);
    }
    if (t.schedule != LLAMA_STEER_CONSTANT) {
        if (t.over < 1 || t.over > LLAMA_STEER_MAX_OVER) {
            bad("the schedule of %.80s is over %d tokens: 1 to %d are possible", name, t.over, LLAMA_STEER_MAX_OVER);
        }
        if (!(t.floor >= 0.0 && t.floor <= 1.0)) {
            bad("the floor of the schedule of %.80s is %g: give a part of the strength, from 0 to 1", name, t.floor);
        }
        if (t.scope == LLAMA_STEER_SCOPE_PROMPT) {
            bad("a schedule counts tokens of the response, so %.80s cannot have one with scope prompt", name);
        }
    }
    if (t.strength != 0.0 && (t.scope == LLAMA_STEER_SCOPE_THINKING || t.scope == LLAMA_STEER_SCOPE_ANSWER)) {
        const bool thinking = t.scope == LLAMA_STEER_SCOPE_THINKING;
        if (!ph.known) {
            bad("scope '%s' of %.80s cannot be followed here, as it is not known how this model parts thinking from its answer: use response",
                thinking ? "thinking" : "answer", name);
        }
        if (thinking && ph.open.empty() && ph.close.empty()) {
            bad("scope 'thinking' of %.80s needs a model with thinking tags: use response or all", name);
        }
    }
}

} // namespace

struct llama_steer_plan {
    std::vector<llama_steer_plan_term> terms;
    int32_t last_prompt;
    phases phase;

    std::vector<llama_steer_segment> segments;
    std::vector<double> strengths; // [segments][terms]

    llama_steer_plan(int32_t n_terms, const llama_steer_plan_term * given, int32_t last_prompt, const llama_steer_tags * tags)
        : last_prompt(last_prompt), phase(tags) {
        if (last_prompt < 0) {
            bad("a prompt cannot end at position %d", last_prompt);
        }
        set_terms(n_terms, given, 0);
    }

    int32_t response_start() const { return std::max(1, last_prompt); }

    bool acts(const llama_steer_plan_term & t, int32_t pos) const {
        const bool response = pos >= response_start();
        switch (t.scope) {
            case LLAMA_STEER_SCOPE_ALL:
                return pos >= 1;
            case LLAMA_STEER_SCOPE_PROMPT:
                return pos >= 1 && !response;
            case LLAMA_STEER_SCOPE_RESPONSE:
                return response;
            case LLAMA_STEER_SCOPE_THINKING:
                return response && phase.thinking;
            case LLAMA_STEER_SCOPE_ANSWER:
                return response && !phase.thinking && !phase.tool;
            default:
                return pos >= t.first && (t.last < 0 || pos <= t.last);
        }
    }

    double strength_at(const llama_steer_plan_term & t, int32_t pos) const {
        return acts(t, pos) ? t.strength * factor(t, pos - response_start()) : 0.0;
    }

    void set_terms(int32_t n_terms, const llama_steer_plan_term * given, int32_t pos) {
        if (n_terms < 0 || n_terms > LLAMA_STEER_MAX_TERMS || (n_terms > 0 && !given)) {
            bad("a steering takes 0 to %d terms, not %d", LLAMA_STEER_MAX_TERMS, n_terms);
        }
        for (int32_t i = 0; i < n_terms; ++i) {
            check(given[i], phase);
        }
        llama_steer_plan next(*this); // an error must change nothing
        next.terms.assign(given, given + n_terms);
        next.segments.clear();
        next.set_from(pos);
        std::swap(terms, next.terms);
        std::swap(segments, next.segments);
        std::swap(strengths, next.strengths);
    }

    // Work out the segments from pos on, in the present phase; those before pos stay. Throws before it changes anything.
    void set_from(int32_t pos) {
        const int32_t start = response_start();
        std::set<int32_t> edges = { pos, 1, start };
        for (const auto & t : terms) {
            for (int32_t n = step_of(t); decays(t) && n < t.over; n += step_of(t)) {
                edges.insert(start + n);
            }
            if (decays(t)) {
                edges.insert(start + t.over);
            }
            if (t.scope == LLAMA_STEER_SCOPE_RANGE && t.strength != 0.0) {
                edges.insert(t.first);
                edges.insert(t.last < 0 || t.last == INT32_MAX ? t.first : t.last + 1);
            }
        }
        edges.erase(edges.begin(), edges.lower_bound(pos));
        if (edges.size() > LLAMA_STEER_MAX_SEGMENTS) {
            bad("the schedules and positions of these terms change the steering at %zu places, %d are the limit: give terms the same ones",
                edges.size(), LLAMA_STEER_MAX_SEGMENTS);
        }
        while (!segments.empty() && segments.back().first >= pos) {
            segments.pop_back();
        }
        strengths.resize(segments.size() * terms.size());
        if (!segments.empty()) {
            segments.back().end = pos;
        }
        for (int32_t edge : edges) {
            bool same = !segments.empty();
            for (size_t i = 0; i < terms.size(); ++i) {
                strengths.push_back(strength_at(terms[i], edge));
                same = same && strengths.back() == strengths[(segments.size() - 1) * terms.size() + i];
            }
            if (same) { // one runs on
                strengths.resize(segments.size() * terms.size());
                segments.back().end = -1;
                continue;
            }
            if (!segments.empty()) {
                segments.back().end = edge;
            }
            segments.push_back({ edge, -1, nullptr });
        }
        for (size_t i = 0; i < segments.size(); ++i) {
            segments[i].strengths = strengths.data() + i * terms.size();
        }
    }

    bool feed(int32_t pos, const std::string & text) {
        const bool thinking = phase.thinking;
        const bool tool = phase.tool;
        phase.feed(text, true);
        if (thinking == phase.thinking && tool == phase.tool) {
            return false;
        }
        const bool matters = std::any_of(terms.begin(), terms.end(), [](const llama_steer_plan_term & t) {
            return t.strength != 0.0 && (t.scope == LLAMA_STEER_SCOPE_THINKING || t.scope == LLAMA_STEER_SCOPE_ANSWER);
        });
        if (matters) {
            set_from(std::max(pos, segments.empty() ? 0 : segments.front().first));
        }
        return matters;
    }
};

llama_steer_plan * llama_steer_plan_new(int32_t n_terms, const llama_steer_plan_term * terms, int32_t last_prompt, const llama_steer_tags * tags) {
    llama_steer_plan * res = nullptr;
    guarded([&]() { res = new llama_steer_plan(n_terms, terms, last_prompt, tags); });
    return res;
}

void llama_steer_plan_free(llama_steer_plan * plan) {
    delete plan;
}

const char * llama_steer_plan_error(void) {
    return last_error.c_str();
}

bool llama_steer_plan_tracks(const llama_steer_plan * plan) {
    return plan->phase.tracks();
}

int32_t llama_steer_plan_feed(llama_steer_plan * plan, int32_t pos, const char * text, int32_t n_text) {
    int32_t res = -1;
    guarded([&]() {
        if (pos < 0 || n_text < 0 || (n_text > 0 && !text)) {
            bad("there is no text of %d bytes at position %d", n_text, pos);
        }
        res = plan->feed(pos, std::string(text ? text : "", n_text)) ? 1 : 0;
    });
    return res;
}

int32_t llama_steer_plan_change(llama_steer_plan * plan, int32_t pos, int32_t n_terms, const llama_steer_plan_term * terms) {
    return guarded([&]() {
        if (pos < 0) {
            bad("a change cannot begin at position %d", pos);
        }
        plan->set_terms(n_terms, terms, pos);
    })
               ? 0
               : -1;
}

bool llama_steer_plan_thinking(const llama_steer_plan * plan) {
    return plan->phase.thinking;
}

bool llama_steer_plan_in_tool(const llama_steer_plan * plan) {
    return plan->phase.tool;
}

int32_t llama_steer_plan_segments(const llama_steer_plan * plan, const llama_steer_segment ** out) {
    *out = plan->segments.data();
    return (int32_t) plan->segments.size();
}

int32_t llama_steer_plan_terms(const llama_steer_plan * plan, const llama_steer_plan_term ** out) {
    *out = plan->terms.data();
    return (int32_t) plan->terms.size();
}
