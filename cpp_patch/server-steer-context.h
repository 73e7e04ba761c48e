// server-steer-context.h - the part of server_context_impl that deals with steering. Included inside that class, because its slots
// are private to server-context.cpp: what server.patch adds there are calls of these and of `steer`.

public:
    server_steer steer; // HTTP threads parse with it
private:

    void steer_send_error(int id_task, const server_steer_error & e) {
        send_error(id_task, e.what(), e.code == 503 ? ERROR_TYPE_UNAVAILABLE : e.code == 404 ? ERROR_TYPE_NOT_FOUND : ERROR_TYPE_INVALID_REQUEST);
    }

    // before a slot is looked for; false: the task is answered with an error
    bool steer_plan(server_task & task) {
        try {
            steer.plan(task.params.steer, task.tokens);
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
                res->positions.push_back(steer.change(slot.id, task.params.steer->terms, slot.prompt.tokens, input, fresh));
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
