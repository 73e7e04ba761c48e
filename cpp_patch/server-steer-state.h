// server-steer-state.h - what is known of a slot while it works; shared by server-steer-slots.cpp and server-steer-read.cpp.
#ifndef SERVER_STEER_STATE_H
#define SERVER_STEER_STATE_H

#include "server-steer-slots.h"
#include "server-steer-tags.h"

#include <cmath>

constexpr size_t MAX_CAPTURE_BYTES = (size_t) 64 << 20; // larger buffers for reading are freed when nobody reads

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
        const size_t n_tokens = mtmd_input_chunk_get_n_tokens(chunk.get());
        const llama_pos n_pos = mtmd_input_chunk_get_n_pos(chunk.get());
        for (size_t k = 0; k < n_tokens; ++k) {
            res[i + k] = pos + ((size_t) n_pos == n_tokens ? (llama_pos) k : 0);
        }
        i += n_tokens;
        pos += n_pos;
    }
    return res;
}

// A gate of a slot: the sum of the states it looks at, until it is decided.
struct server_steer_gate_state {
    server_steer_vector_ptr gate;
    llama_pos first = 0; // positions it looks at, both included
    llama_pos last = 0;
    llama_pos next = 0;      // the next of them; a decode may be repeated
    std::vector<double> sum; // [n_embd]
    bool decided = false;
    double score = 0.0;

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
            dot += sum[i] * v;
            h2 += sum[i] * sum[i];
            v2 += v * v;
        }
        score = h2 * v2 > 0.0 ? dot / std::sqrt(h2 * v2) : 0.0;
        decided = true;
    }
};

struct server_steer_slots::slot_state {
    server_steer_request_ptr request; // null: the slot is not ours
    plan_ptr plan;                    // points into the request's terms
    llama_pos last_pos = 0;           // of the prompt
    bool steered = false;
    bool begun = false;   // the tokens in its cache are those of this request
    bool shifted = false; // positions no longer say where in the text a token is

    std::vector<server_steer_gate_state> gates;
    int32_t held_back = -1; // index of the token that waits for them

    // reading
    std::vector<llama_pos> wanted;                // sorted
    int32_t first_wanted = -1;                    // token index
    std::set<std::pair<int32_t, llama_pos>> seen; // (layer, position): a decode may be repeated
    std::vector<double> sums;
    std::shared_ptr<server_steer_values> values;

    int32_t n_sampled = 0;
    bool id_sent = false;
    llama_tokens unsent;                             // tokens that no chunk has carried yet
    std::map<llama_pos, std::vector<double>> probed; // projections on the directions of all probes, one after the other
    std::vector<double> probe_now;                   // of the token sampled last
    std::vector<std::vector<double>> probe_all;

    bool reads() const { return request && request->read; }

    bool captures() const { return request && (request->read || !request->probes.empty() || !gates.empty()); }

    bool open(const server_steer_vector & gate) const {
        for (const auto & g : gates) {
            if (g.decided && g.same(gate)) {
                return gate.gate->above ? g.score > gate.gate->threshold : g.score < gate.gate->threshold;
            }
        }
        return false;
    }
};

#endif // SERVER_STEER_STATE_H
