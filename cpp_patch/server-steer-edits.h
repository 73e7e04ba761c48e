// server-steer-edits.h - what was applied to each token of a prompt cache: the key that keeps stale states out.
#ifndef SERVER_STEER_EDITS_H
#define SERVER_STEER_EDITS_H

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

// The edit id (llama_steer_edit_id) of each token of a server_tokens, by index. Missing entries are 0: not steered.
struct server_steer_edits {
    std::vector<uint64_t> ids;
    bool planned = false;    // the ids are those of a task that waits for a slot
    size_t moved = SIZE_MAX; // first token whose state was computed at another position, or is of unknown origin

    uint64_t at(size_t i) const { return i < ids.size() ? ids[i] : 0; }

    bool any() const {
        return std::any_of(ids.begin(), ids.end(), [](uint64_t id) { return id != 0; });
    }

    void clear() { *this = {}; }

    void moved_from(size_t i) { moved = std::min(moved, i); }

    // the tokens from n on are gone
    void keep_first(size_t n) {
        if (ids.size() > n) {
            ids.resize(n);
        }
        moved = n <= moved ? SIZE_MAX : moved;
    }

    // First index where two token lists were not treated alike, SIZE_MAX when there is none: no prefix may reach beyond it.
    size_t first_difference(const server_steer_edits & other) const {
        const size_t n = std::max(ids.size(), other.ids.size());
        for (size_t i = 0; i < n; ++i) {
            if (at(i) != other.at(i)) {
                return i;
            }
        }
        return SIZE_MAX;
    }
};

#endif // SERVER_STEER_EDITS_H
