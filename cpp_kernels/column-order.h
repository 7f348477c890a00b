#pragma once

// The orders of the columns of PTQ1_61 matrices in a model: which tensor has that of a matrix, whether it is one, and the activations in it.
// docs/formats.md says what a file has.

#include "ggml.h"
#include "ggml-backend.h"

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

class column_orders {
  public:
    // activations of a graph that are in some order already
    typedef std::map<std::pair<ggml_tensor *, ggml_tensor *>, ggml_tensor *> gathered;

    // finds the order of every matrix that has one, among a model's tensors
    void load(const std::vector<std::pair<std::string, ggml_tensor *>> & tensors) {
        std::unordered_map<std::string, ggml_tensor *> by_name(tensors.begin(), tensors.end());

        for (const auto & [name, w] : tensors) {
            const std::string end = ".weight";
            if (w->type != GGML_TYPE_PTQ1_61 || name.size() <= end.size() || name.compare(name.size() - end.size(), end.size(), end) != 0) {
                continue;
            }
            const std::string own = name.substr(0, name.size() - end.size());

            auto order = by_name.find(own + ".order");
            if (order == by_name.end()) {
                order = by_name.find(that_shares_input(own) + ".order");
            }
            if (order == by_name.end()) {
                continue; // the columns are the inputs'
            }
            if (order->second->type != GGML_TYPE_I32 || order->second->ne[0] != w->ne[0] || ggml_nelements(order->second) != w->ne[0]) {
                throw std::runtime_error("tensor '" + order->first + "' is no order of the columns of '" + name + "'");
            }
            orders.emplace(w, order->second);
        }
    }

    // The gather reads wherever an order points to, so it has to be a permutation; call this when tensors have their data.
    void check() const {
        std::map<const ggml_tensor *, bool> checked;
        for (const auto & [w, order] : orders) {
            if (checked[order]) {
                continue;
            }
            checked[order] = true;

            std::vector<int32_t> cols(order->ne[0]);
            ggml_backend_tensor_get(order, cols.data(), 0, cols.size()*sizeof(int32_t));

            std::vector<bool> seen(cols.size());
            for (const int32_t col : cols) {
                if (col < 0 || (size_t) col >= cols.size() || seen[col]) {
                    throw std::runtime_error(std::string("tensor '") + order->name + "' is no permutation of 0 to " + std::to_string(cols.size() - 1));
                }
                seen[col] = true;
            }
        }
    }

    // activations as the columns of a matrix have them
    ggml_tensor * apply(ggml_context * ctx, ggml_tensor * w, ggml_tensor * cur, gathered & done) const {
        const auto order = orders.find(w);
        if (order == orders.end()) {
            return cur;
        }
        ggml_tensor *& res = done[{ cur, order->second }];
        if (res == nullptr) {
            res = ggml_get_cols(ctx, cur, order->second);
        }
        return res;
    }

    // A graph that multiplies with such a matrix in some way that does not go through apply() would be silently wrong.
    void check(ggml_cgraph * gf) const {
        for (int i = 0; i < (orders.empty() ? 0 : ggml_graph_n_nodes(gf)); i++) {
            const ggml_tensor * node = ggml_graph_node(gf, i);
            if (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_MUL_MAT_ID) {
                continue;
            }
            const auto order = orders.find(node->src[0]);
            if (order != orders.end() && (node->src[1]->op != GGML_OP_GET_COLS || node->src[1]->src[1] != order->second)) {
                throw std::runtime_error(std::string("this architecture does not put its activations into the order of the columns of '") + node->src[0]->name + "'");
            }
        }
    }

  private:
    std::unordered_map<const ggml_tensor *, ggml_tensor *> orders;

    // the matrix that has the order of all that share its input
    static std::string that_shares_input(const std::string & name) {
        static const std::pair<const char *, const char *> shared[] = {
            { ".attn_k",       ".attn_q"         },
            { ".attn_v",       ".attn_q"         },
            { ".ffn_up",       ".ffn_gate"       },
            { ".ffn_up_exps",  ".ffn_gate_exps"  },
            { ".ffn_up_shexp", ".ffn_gate_shexp" },
        };
        for (const auto & [mine, theirs] : shared) {
            const size_t at = name.rfind('.');
            if (at != std::string::npos && name.compare(at, std::string::npos, mine) == 0) {
                return name.substr(0, at) + theirs;
            }
        }
        return name;
    }
};
