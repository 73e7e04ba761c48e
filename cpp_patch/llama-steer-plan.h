// llama-steer-plan.h - when each term of a steering acts: scope, schedule and phase become strengths by position.
//
// A plan is what one text gets. It knows the terms, where the prompt ends and what the response has said so far, and gives segments:
// runs of positions with the same strengths. Whoever applies it, applies those; nobody else looks at scopes or schedules.
//
//   position 0   a sink token, left alone by every scope but an explicit range
//   response     begins at the last prompt token, which produces the first sampled one (never before position 1)
//   thinking     response tokens from the one that completes an opening tag until the one that completes a closing tag
//   answer       response tokens that are neither thinking nor part of a tool call
//
// Only the template itself and the response can open or close thinking: what a user's message says changes nothing. So the generation
// prompt is looked at and not the prompt, or of a raw prompt nothing but a tag that it ends with, white space aside.
//
// This header and llama-steer-plan.cpp need nothing of llama.cpp, so they can be built by themselves. What applies a plan to a context
// is in llama-steer.h. Nothing here is thread safe for one plan; different plans do not know of each other.
#ifndef LLAMA_STEER_PLAN_H
#define LLAMA_STEER_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && !defined(__MINGW32__) && (defined(LLAMA_SHARED) || defined(LLAMA_STEER_PLAN_ALONE))
#if defined(LLAMA_BUILD) || defined(LLAMA_STEER_PLAN_ALONE)
#define LLAMA_STEER_PLAN_API __declspec(dllexport)
#else
#define LLAMA_STEER_PLAN_API __declspec(dllimport)
#endif
#elif defined(_WIN32)
#define LLAMA_STEER_PLAN_API
#else
#define LLAMA_STEER_PLAN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

    enum llama_steer_op {
        LLAMA_STEER_ADD = 0,
        LLAMA_STEER_PROJECT = 1,
        LLAMA_STEER_CLAMP = 2,
        LLAMA_STEER_RENORM = 3, // each stream keeps its own length
        LLAMA_STEER_FLOOR = 4,  // the component is level * scale at least
        LLAMA_STEER_CAP = 5,    // at most
    };

    enum llama_steer_scope {
        LLAMA_STEER_SCOPE_ALL = 0,    // every position but 0
        LLAMA_STEER_SCOPE_PROMPT = 1, // of these, the ones before the response
        LLAMA_STEER_SCOPE_RESPONSE = 2,
        LLAMA_STEER_SCOPE_THINKING = 3,
        LLAMA_STEER_SCOPE_ANSWER = 4,
        LLAMA_STEER_SCOPE_RANGE = 5, // positions first to last, whatever they are
    };

    // How the strength decays over the tokens of a response. The state that decides the first of them has the full strength, those
    // from token `over` on have `floor` of it. Before the response nothing decays.
    enum llama_steer_schedule {
        LLAMA_STEER_CONSTANT = 0,
        LLAMA_STEER_LINEAR = 1,
        LLAMA_STEER_COSINE = 2, // half a wave, flat at both ends
    };

#define LLAMA_STEER_MAX_TERMS    256  // of a plan, and of a config
#define LLAMA_STEER_MAX_OVER     4096 // tokens of a schedule
#define LLAMA_STEER_MAX_STEPS    64   // of a schedule: a longer one holds each strength for ceil(over/64) tokens
#define LLAMA_STEER_MAX_SEGMENTS 1024 // from one change of a plan on
#define LLAMA_STEER_MAX_DOSE     1e15 // |strength * scale| of a term, in units of the hidden state
#define LLAMA_STEER_MIN_PROJECT  -1.0 // strengths of project: at both ends a component becomes twice as long
#define LLAMA_STEER_MAX_PROJECT  3.0
#define LLAMA_STEER_MAX_COLUMNS  16 // at one layer and site of a vector

    // Reads the state along one row and writes along another, at a layer and site where the vector has a direction:
    // h += strength * gain * phi(read.h + bias) * write, with phi(z) = z above the knee and 0 elsewhere.
    struct llama_steer_column {
        int32_t layer;
        int32_t site;
        double gain;
        double bias; // in units of the hidden state
        double knee; // 0: ReLU, above 0: JumpReLU, -INFINITY: phi(z) = z
    };

    // A steering vector, by content: n unit directions. The arrays are the caller's and must outlive the plans that name it.
    struct llama_steer_vector {
        const char * key; // hash of the content, such as sha256 in hex: vectors with the same key are the same
        int32_t n;
        const int32_t * layers;                    // [n]
        const int32_t * sites;                     // [n] enum llama_steer_site
        const float * dirs;                        // [n][n_embd] unit directions
        const double * scales;                     // [n] dose at strength 1, in units of the hidden state
        int32_t n_columns;                         // may be 0, the rest is not looked at then
        const struct llama_steer_column * columns; // [n_columns]
        const float * reads;                       // [n_columns][n_embd] unit rows
        const float * writes;                      // [n_columns][n_embd] unit rows
    };

    struct llama_steer_plan_term {
        const char * name;                        // for sentences; may be NULL
        const struct llama_steer_vector * vector; // NULL: the plan is for its segments only, and never applied to a context
        double strength;                          // finite; 0 = not applied (a closed gate is such a term)
        int32_t op;                               // enum llama_steer_op
        int32_t il_first;                         // layer window, inclusive, -1 = open end
        int32_t il_last;
        int32_t stream; // -1: all
        int32_t scope;  // enum llama_steer_scope
        int32_t first;  // of SCOPE_RANGE, both included; last -1 = open end
        int32_t last;
        int32_t schedule; // enum llama_steer_schedule
        int32_t over;     // of a schedule: 1 to LLAMA_STEER_MAX_OVER tokens
        double floor;     // 0 to 1
        double level;     // of LLAMA_STEER_FLOOR and LLAMA_STEER_CAP, in units of the scales; else 0
    };

    // The tags that part a response, as text. Copied.
    struct llama_steer_tags {
        bool known;                     // can thinking be told from the answer? if not, both scopes are refused
        bool all_tools;                 // the whole response is a tool call
        const char * generation_prompt; // what the chat template put at the end of the prompt; NULL: that is not known
        const char * prompt_end;        // then this is looked at: the prompt, or its end, where only a tag at the very end counts
        const char * const * open;      // what opens thinking
        int32_t n_open;
        const char * const * close;
        int32_t n_close;
        const char * const * tool_open;
        int32_t n_tool_open;
        const char * const * tool_close;
        int32_t n_tool_close;
    };

    // Positions first <= p < end (end -1: no end) have these strengths; 0 where a term does not act.
    struct llama_steer_segment {
        int32_t first;
        int32_t end;
        const double * strengths; // [terms]
    };

    struct llama_steer_plan;

    // The plan of a text whose prompt ends at position `last_prompt` (0 for an empty or one-token prompt). tags NULL: they are not known.
    // NULL on an error: llama_steer_plan_error() tells it in one sentence. The terms are copied, what they point to is not.
    LLAMA_STEER_PLAN_API struct llama_steer_plan * llama_steer_plan_new(
        int32_t n_terms, const struct llama_steer_plan_term * terms, int32_t last_prompt, const struct llama_steer_tags * tags);
    LLAMA_STEER_PLAN_API void llama_steer_plan_free(struct llama_steer_plan * plan);

    // Why the last call in this thread failed. Never NULL.
    LLAMA_STEER_PLAN_API const char * llama_steer_plan_error(void);

    // Does the text of the response matter? If not, llama_steer_plan_feed() need not be called. A change of terms does not change this.
    LLAMA_STEER_PLAN_API bool llama_steer_plan_tracks(const struct llama_steer_plan * plan);

    // The response token at position pos (ascending; a sampled one, or one that is given) prints this text, special tokens included.
    // 1: the segments from pos on are others now; 0: they are as before; negative: an error.
    LLAMA_STEER_PLAN_API int32_t llama_steer_plan_feed(struct llama_steer_plan * plan, int32_t pos, const char * text, int32_t n_text);

    // Other terms from position pos on: a live change, or gates that were decided. Segments before pos are forgotten, the phase is
    // not. 0, or negative on an error, which changes nothing.
    LLAMA_STEER_PLAN_API int32_t llama_steer_plan_change(
        struct llama_steer_plan * plan, int32_t pos, int32_t n_terms, const struct llama_steer_plan_term * terms);

    // Is the response thinking, or in a tool call, after what was fed?
    LLAMA_STEER_PLAN_API bool llama_steer_plan_thinking(const struct llama_steer_plan * plan);
    LLAMA_STEER_PLAN_API bool llama_steer_plan_in_tool(const struct llama_steer_plan * plan);

    // All segments, ascending and without gaps, the last one open; and the terms whose strengths they have. Valid until the plan
    // is fed, changed or freed.
    LLAMA_STEER_PLAN_API int32_t llama_steer_plan_segments(const struct llama_steer_plan * plan, const struct llama_steer_segment ** out);
    LLAMA_STEER_PLAN_API int32_t llama_steer_plan_terms(const struct llama_steer_plan * plan, const struct llama_steer_plan_term ** out);

#ifdef __cplusplus
}
#endif

#endif // LLAMA_STEER_PLAN_H
