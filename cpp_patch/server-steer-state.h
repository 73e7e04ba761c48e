// server-steer-state.h - what is known of a slot while it works; shared by server-steer-slots.cpp and server-steer-read.cpp.
#ifndef SERVER_STEER_STATE_H
#define SERVER_STEER_STATE_H

#include "server-steer.h"

#include <cmath>

// Position of each token; an image may take another number of positions than of tokens.
inline std::vector<llama_pos> server_steer_positions(const server_tokens & tokens) {
    std::vector<llama_pos> res(tokens.size());
    llama_pos pos = 0;
    for (size_t i = 0; i < tokens.size();) {
        if (tokens[i] != LLAMA_TOKEN_NULL) {
            res[i++] = pos++;
            continue;
        }
        const auto & chunk = tokens.find_chunk(i);
        const size_t    n_tokens = mtmd_input_chunk_get_n_tokens(chunk.get());
        const llama_pos n_pos    = mtmd_input_chunk_get_n_pos(chunk.get());
        for (size_t k = 0; k < n_tokens; ++k) {
            res[i + k] = pos + ((size_t) n_pos == n_tokens ? (llama_pos) k : 0);
        }
        i   += n_tokens;
        pos += n_pos;
    }
    return res;
}

// Follows the text of a response through thinking and tool calls, by the template's own tags.
struct server_steer_phases {
    const server_steer_tags * tags = nullptr;
    bool thinking = false;
    bool tool     = false;
    std::string tail; // text that could be the beginning of a tag

    // Anything to follow? Done for every steered request with tags: a live change may bring a scope that needs it.
    bool tracks() const {
        return !tags->open.empty() || !tags->close.empty() || !tags->tool_open.empty();
    }

    void start(const server_steer_tags & t) {
        *this = {};
        tags = &t;
        tool = t.all_tools;
    }

    void feed(const std::string & piece, bool response) {
        const size_t seen = tail.size();
        tail += piece;
        size_t best = 0; // end of the last tag that ends within the piece
        size_t longest = 0;
        const auto look = [&](const std::string & tag, bool & phase, bool value) {
            longest = std::max(longest, tag.size());
            const size_t at = tag.empty() ? std::string::npos : tail.rfind(tag);
            if (at != std::string::npos && at + tag.size() > seen && at + tag.size() >= best) {
                best  = at + tag.size();
                phase = value;
            }
        };
        look(tags->open, thinking, true);
        for (const auto & tag : tags->close) {
            look(tag, thinking, false);
        }
        if (response && !tags->all_tools) {
            best = 0;
            for (const auto & tag : tags->tool_open) {
                look(tag, tool, true);
            }
            for (const auto & tag : tags->tool_close) {
                look(tag, tool, false);
            }
        }
        if (tail.size() > longest) {
            tail.erase(0, tail.size() - longest);
        }
    }
};

// Tokens first <= p < end (end < 0: no end) have the terms of `active`, at the strengths they have where response token n is decided.
struct server_steer::segment {
    llama_pos first;
    llama_pos end;
    uint64_t  active;
    int32_t   n;
};

// A gate of a slot: the sum of the states it looks at, until it is decided.
struct server_steer_gate_state {
    server_steer_vector_ptr gate;
    llama_pos first = 0; // positions it looks at, both included
    llama_pos last  = 0;
    llama_pos next  = 0; // the next of them; a decode may be repeated
    std::vector<double> sum; // [n_embd]
    bool   decided = false;
    double score   = 0.0;

    bool same(const server_steer_vector & other) const {
        return gate->content_sha256 == other.content_sha256 && gate->gate->mean == other.gate->mean;
    }

    void add(llama_pos pos, const float * row) {
        if (pos == next && pos <= last) {
            for (size_t i = 0; i < sum.size(); ++i) {
                sum[i] += row[i];
            }
            next++;
        }
    }

    // the cosine between what was read and the condition vector
    void decide() {
        double dot = 0.0, h2 = 0.0, v2 = 0.0;
        for (size_t i = 0; i < sum.size(); ++i) {
            const double v = gate->dirs[i];
            dot += sum[i]*v;
            h2  += sum[i]*sum[i];
            v2  += v*v;
        }
        score   = h2*v2 > 0.0 ? dot/std::sqrt(h2*v2) : 0.0;
        decided = true;
    }
};

struct server_steer::slot_state {
    server_steer_request_ptr request; // null: the slot is not ours
    server_steer_terms terms;         // of the request, until a live change replaces them
    llama_pos     last_pos = 0;       // of the prompt
    server_steer_phases phases;
    uint64_t      active = 0;         // terms at the next token
    std::set<std::string> held;       // configs that its ranges name
    bool steered = false;
    bool begun   = false;             // the tokens in its cache are those of this request
    bool shifted = false;             // positions no longer say where in the text a token is

    std::vector<server_steer_gate_state> gates;
    int32_t held_back = -1;           // index of the token that waits for them

    // reading
    std::vector<llama_pos> wanted;    // sorted
    int32_t first_wanted = -1;        // token index
    std::set<std::pair<int32_t, llama_pos>> seen; // (layer, position): a decode may be repeated
    std::vector<double> sums;
    std::shared_ptr<server_steer_values> values;

    int32_t n_sampled = 0;
    bool    id_sent   = false;
    llama_tokens unsent;              // tokens that no chunk has carried yet
    std::map<llama_pos, std::vector<double>> probed; // projections on the directions of all probes, one after the other
    std::vector<double> probe_now;                   // of the token sampled last
    std::vector<std::vector<double>> probe_all;

    bool reads() const { return request && request->read; }

    bool taps() const { return request && (request->read || !request->probes.empty() || !gates.empty()); }

    bool open(const server_steer_vector & gate) const {
        for (const auto & g : gates) {
            if (g.decided && g.same(gate)) {
                return gate.gate->above ? g.score > gate.gate->threshold : g.score < gate.gate->threshold;
            }
        }
        return false;
    }

    llama_pos response_start() const { return std::max(1, last_pos); }

    // Terms that act at a position, in the present phase.
    uint64_t active_at(llama_pos pos) const {
        const bool response = pos >= response_start();
        uint64_t res = 0;
        for (size_t i = 0; i < terms.size(); ++i) {
            const auto & t = terms[i];
            bool acts = false;
            switch (t.scope) {
                case server_steer_term::ALL:      acts = pos >= 1; break;
                case server_steer_term::PROMPT:   acts = pos >= 1 && !response; break;
                case server_steer_term::RESPONSE: acts = response; break;
                case server_steer_term::THINKING: acts = response && phases.thinking; break;
                case server_steer_term::ANSWER:   acts = response && !phases.thinking && !phases.tool; break;
                case server_steer_term::RANGE:    acts = pos >= t.first && (t.last < 0 || pos <= t.last); break;
            }
            acts = acts && (!t.gate || open(*t.gate));
            res |= acts && t.strength != 0.0 ? 1ull << i : 0;
        }
        return res;
    }

    // What the tokens from a position on get, in the present phase.
    std::vector<segment> from(llama_pos pos) const {
        std::set<llama_pos> edges = { pos, 1, response_start() };
        for (const auto & t : terms) {
            for (int32_t n = t.schedule.over; n >= 1 && response_start() + n >= pos; --n) {
                edges.insert(response_start() + n);
            }
            if (t.scope == server_steer_term::RANGE) {
                edges.insert(t.first);
                edges.insert(t.last < 0 ? t.first : t.last + 1);
            }
        }
        std::vector<segment> res;
        for (llama_pos edge : edges) {
            if (edge < pos) {
                continue;
            }
            if (!res.empty()) {
                res.back().end = edge;
            }
            res.push_back({ edge, -1, active_at(edge), std::max(0, edge - response_start()) });
        }
        return res;
    }
};

#endif // SERVER_STEER_STATE_H
