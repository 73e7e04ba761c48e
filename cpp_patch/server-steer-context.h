// clang-format off: included inside a class of llama-server
// server-steer-context.h - the part of server_context_impl that deals with steering. Included inside that class, because its slots
// are private to server-context.cpp: what server.hooks adds there are calls of these and of `steer`.

public:
    mutable server_steer_store steer_store; // HTTP threads parse with it, some through a const reference
private:
    server_steer_slots steer { steer_store };

    void steer_send_error(int id_task, const server_steer_error & e) {
        SRV_ERR("task id = %d, error: %s\n", id_task, e.what());
        auto res = std::make_unique<server_task_result_steer_error>(e);
        res->id = id_task;
        queue_results.send(std::move(res));
    }

    // End a slot with an error, and those that wait for what it computes; nothing of its cache is kept.
    void steer_fail(server_slot & slot, const server_steer_error & e) {
        const int id_task = slot.task->id;
        for (auto & other : slots) {
            const bool waits = other.state == SLOT_STATE_WAIT_OTHER && other.task->id_parent == id_task;
            if (waits || other.id == slot.id) {
                steer_send_error(other.task->id, e);
                other.release();
                server_steer_compat::prompt_clear(other, 0);
            }
        }
    }

    // What the last decode could not do for a slot ends that slot.
    void steer_check_decoded() {
        for (auto & slot : slots) {
            if (!slot.is_processing()) {
                continue;
            }
            try {
                steer.check_decoded(slot.id);
            } catch (const server_steer_error & e) {
                steer_fail(slot, e);
            }
        }
    }

    // Once anything was steered: are the outputs of this part of the batch numbers? A state that has outgrown its numbers spoils the
    // cells of its slot, and attention reads the cells of others too, with a weight of 0, which makes nothing of a NaN. Such a slot
    // ends with an error, and what it left behind is wiped before anybody else comes near it.
    void steer_check_finite(int32_t n_batch_tokens, int32_t off) {
        if (!steer.has_steered()) {
            return;
        }
        bool spoiled = false;
        for (auto & slot : slots) {
            if (!slot.is_processing() || !slot.task->need_sampling() || slot.task->params.sampling.backend_sampling) {
                continue;
            }
            auto outputs = slot.spec_i_batch;
            if (outputs.empty()) {
                outputs.push_back(slot.i_batch);
            }
            for (const int32_t i : outputs) {
                const float * logits = i >= off && i < off + n_batch_tokens ? llama_get_logits_ith(ctx_tgt, i - off) : nullptr;
                if (logits && std::any_of(logits, logits + 8, [](float x) { return !(x < INFINITY); })) {
                    steer_fail(slot, server_steer_error(500, "the hidden state grew beyond what its numbers can hold: use less strength"));
                    spoiled = true;
                    break;
                }
            }
        }
        if (!spoiled) {
            return;
        }
        // freed cells keep their content: the states of those that go on are lifted out, everything is zeroed, and they are put back
        std::vector<std::pair<server_slot *, std::vector<uint8_t>>> kept;
        for (auto & slot : slots) {
            if (!slot.is_processing()) {
                server_steer_compat::prompt_clear(slot, 0);
                continue;
            }
            std::vector<uint8_t> state(llama_state_seq_get_size(ctx_tgt, slot.id));
            state.resize(llama_state_seq_get_data(ctx_tgt, state.data(), state.size(), slot.id));
            kept.emplace_back(&slot, std::move(state));
        }
        llama_memory_clear(llama_get_memory(ctx_tgt), true);
        for (auto & [slot, state] : kept) {
            if (llama_state_seq_set_data(ctx_tgt, state.data(), state.size(), slot->id) != state.size()) {
                steer_fail(*slot, server_steer_error(500, "the cache of this request was lost: send it again"));
            }
        }
    }

    // before a slot is looked for; false: the task is answered with an error, or waits
    bool steer_plan(server_task & task) {
        try {
            steer.plan(task.params.steer, task.tokens);
            if (steer.must_wait(task.params.steer)) {
                queue_tasks.defer(std::move(task)); // offered again when a slot is released
                return false;
            }
            return true;
        } catch (const server_steer_error & e) {
            steer_send_error(task.id, e);
            return false;
        }
    }

    bool steer_launch(server_slot & slot, const server_task & task) {
        try {
            steer.launch(slot.id, task.params.steer, task.tokens);
            return true;
        } catch (const server_steer_error & e) {
            steer_send_error(task.id, e);
            return false;
        }
    }

    // a slot that has come to a token that gates hold back; false: it was answered with an error
    bool steer_decide(server_slot & slot) {
        try {
            steer.decide(slot.id, slot.prompt.n_tokens(), slot.task->tokens);
            return true;
        } catch (const server_steer_error & e) {
            steer_send_error(slot.task->id, e);
            slot.release();
            return false;
        }
    }

    // a live change of the steering of a running request
    void steer_change(const server_task & task) {
        auto res = std::make_unique<server_task_result_steer>();
        res->id = task.id;
        try {
            for (auto & slot : slots) {
                if (!slot.is_processing() || !steer.runs(slot.id, task.params.control_cmpl_id)) {
                    continue;
                }
                const bool fresh = slot.state == SLOT_STATE_STARTED || slot.state == SLOT_STATE_WAIT_OTHER;
                auto & input = const_cast<server_tokens &>(slot.task->tokens); // only its edits change
                llama_pos from = steer.change(slot.id, task.params.steer->terms, slot.prompt.tokens, input, fresh);
                for (const auto & other : slots) {
                    if (slot.state == SLOT_STATE_WAIT_OTHER && other.is_processing() && other.task->id == slot.task->id_parent && other.state != SLOT_STATE_STARTED) {
                        from = other.prompt.tokens.pos_next(); // it takes over what that one has computed
                    }
                }
                res->positions.push_back(from);
            }
            if (res->positions.empty()) {
                throw server_steer_error(404, "no request '" + task.params.control_cmpl_id + "' is running: it has ended");
            }
        } catch (const server_steer_error & e) {
            steer_send_error(task.id, e);
            return;
        }
        queue_results.send(std::move(res));
    }

    // the answer of a read or score task; false: the slot has an ordinary one
    bool steer_send_values(server_slot & slot) {
        const bool scores = steer.forces(slot.id);
        auto values = steer.take_values(slot.id);
        if (!values) {
            return false;
        }
        if (scores && values->logprobs.size() != slot.task->params.steer->forced.size()) {
            send_error(slot, "prompt and response do not fit the context", ERROR_TYPE_INVALID_REQUEST);
            return true;
        }
        auto res = std::make_unique<server_task_result_steer>();
        res->id     = slot.task->id;
        res->index  = slot.task->index;
        res->values = values;
        queue_results.send(std::move(res));
        return true;
    }
