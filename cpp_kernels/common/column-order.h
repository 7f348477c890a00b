#pragma once

// The orders of the columns of PTQ1_61 matrices in a model: which tensor has that of a matrix, whether it is one, and the activations in it.
// docs/formats.md says what a file has. Whatever takes a matrix or its input by name asks here: the graph, llama-imatrix, llama-quantize.

#include "ggml.h"
#include "ggml-backend.h"
#include "is-type.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

class column_orders {
  public:
    typedef std::unordered_map<std::string, ggml_tensor *> tensors;

    // activations of a graph that are in some order already
    typedef std::map<std::pair<ggml_tensor *, ggml_tensor *>, ggml_tensor *> gathered;

    // finds the order of every matrix that has one, among a model's tensors
    void load(const std::vector<std::pair<std::string, ggml_tensor *>> & model) {
        const tensors by_name(model.begin(), model.end());

        for (const auto & [name, w] : model) {
            ggml_tensor * order = tesseraq_has_order(w->type) ? find(by_name, name) : nullptr;
            if (order == nullptr) {
                continue; // the columns are the inputs'
            }
            require_order(order, name, w);
            orders.emplace(w, order);
            names.emplace(name, order);
        }
        require_use(by_name);
    }

    // The gather reads wherever an order points to, so it has to be a permutation; call this when tensors have their data.
    void check() const {
        for (const ggml_tensor * order : all()) {
            columns(order);
        }
    }

    // the tensors of orders, by their names
    std::vector<ggml_tensor *> all() const {
        std::map<std::string, ggml_tensor *> found;
        for (const auto & [w, order] : orders) {
            found.emplace(order->name, order);
        }
        std::vector<ggml_tensor *> result;
        for (const auto & [name, order] : found) {
            result.push_back(order);
        }
        return result;
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

    // Activations that a graph multiplies with a matrix, as they were before they were put into its order: `data` is that of `cur`, F32, and
    // the result is that, or rows at the same places of `buf`, which `data` may be in.
    const char * undo(const std::string & name, const ggml_tensor * cur, const char * data, std::vector<char> & buf) const {
        const auto order = names.find(name);
        if (order == names.end()) {
            return data;
        }
        const std::vector<int32_t> cols = columns(order->second);
        std::vector<float> row(cols.size());
        if (data != buf.data()) {
            buf.assign(data, data + ggml_nbytes(cur));
        }
        for (int64_t i = 0; i < ggml_nrows(cur); i++) {
            char * x = buf.data() + i % cur->ne[1]*cur->nb[1] + i/cur->ne[1] % cur->ne[2]*cur->nb[2] + i/cur->ne[1]/cur->ne[2]*cur->nb[3];
            for (size_t j = 0; j < cols.size(); j++) {
                memcpy(&row[cols[j]], x + j*cur->nb[0], sizeof(float));
            }
            for (size_t j = 0; j < cols.size(); j++) {
                memcpy(x + j*cur->nb[0], &row[j], sizeof(float));
            }
        }
        return buf.data();
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

    // The order that a matrix has in PTQ1_61, by the names of tensors: its own, or that of the matrix whose input it shares; NULL for none.
    static ggml_tensor * find(const tensors & by_name, const std::string & name) {
        const std::string own = stem(name, ".weight");
        if (own.empty()) {
            return nullptr;
        }
        for (const std::string & of : { own, that_shares_input(own) }) {
            const auto order = by_name.find(of + ".order");
            if (order != by_name.end()) {
                return order->second;
            }
        }
        return nullptr;
    }

    static void require_order(const ggml_tensor * order, const std::string & name, const ggml_tensor * w) {
        if (order->type != GGML_TYPE_I32 || order->ne[0] != w->ne[0] || ggml_nelements(order) != w->ne[0]) {
            throw std::runtime_error(std::string("tensor '") + order->name + "' is no order of the columns of '" + name + "'");
        }
    }

    static void require_permutation(const std::string & name, const std::vector<int32_t> & cols) {
        std::vector<bool> seen(cols.size());
        for (const int32_t col : cols) {
            if (col < 0 || (size_t) col >= cols.size() || seen[col]) {
                throw std::runtime_error("tensor '" + name + "' is no permutation of 0 to " + std::to_string(cols.size() - 1));
            }
            seen[col] = true;
        }
    }

    // A matrix of another type beside its order lost it: some tool that knows no orders has written the file.
    static void require_use(const tensors & by_name) {
        std::set<const ggml_tensor *> used;
        for (const auto & [name, w] : by_name) {
            if (tesseraq_has_order(w->type)) {
                used.insert(find(by_name, name));
            }
        }
        for (const auto & [name, order] : by_name) {
            const std::string own = order->type == GGML_TYPE_I32 ? stem(name, ".order") : "";
            const auto w = own.empty() ? by_name.end() : by_name.find(own + ".weight");
            if (w != by_name.end() && used.count(order) == 0) {
                throw std::runtime_error("'" + w->first + "' is " + ggml_type_name(w->second->type) + ", and '" + name +
                    "' belongs to PTQ1_61: the file was written by a program that does not know orders of columns, and is broken");
            }
        }
    }

  private:
    std::unordered_map<const ggml_tensor *, ggml_tensor *> orders;
    tensors names; // the same by the names of the matrices

    static std::vector<int32_t> columns(const ggml_tensor * order) {
        std::vector<int32_t> cols(order->ne[0]);
        ggml_backend_tensor_get(order, cols.data(), 0, cols.size()*sizeof(int32_t));
        require_permutation(order->name, cols);
        return cols;
    }

    // a name without its end; nothing if it has another end
    static std::string stem(const std::string & name, const std::string & end) {
        const bool has = name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
        return has ? name.substr(0, name.size() - end.size()) : "";
    }

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

// The orders of a file whose matrices get other types (llama-quantize): a matrix that was PTQ1_61 gets the columns of its inputs back, and one
// that becomes PTQ1_61 gets them in the order that the file has for it already.
class column_reordering {
  public:
    // the file's tensors, by name in `tensor`; read(weight, buffer) returns the data of one
    template <typename weights, typename F> column_reordering(const weights & file, F read) {
        column_orders::tensors by_name;
        for (const auto & [name, weight] : file) {
            by_name.emplace(name, weight.tensor);
        }
        column_orders::require_use(by_name);
        for (const auto & [name, w] : by_name) {
            ggml_tensor * order = column_orders::find(by_name, name);
            if (order == nullptr || (!tesseraq_has_order(w->type) && order->type != GGML_TYPE_I32)) {
                continue;
            }
            column_orders::require_order(order, name, w);
            orders.emplace(w, order);
            std::vector<int32_t> & cols = columns[order];
            if (cols.empty()) {
                cols.resize(order->ne[0]);
                const void * data = read(file.at(order->name), (void *) cols.data());
                if (data != cols.data()) {
                    memcpy(cols.data(), data, cols.size()*sizeof(int32_t));
                }
                column_orders::require_permutation(order->name, cols);
            }
        }
    }

    // what a matrix becomes
    void set_type(const ggml_tensor * w, ggml_type type) {
        const auto order = orders.find(w);
        if (order != orders.end() && tesseraq_has_order(type)) {
            used.insert(order->second);
        }
    }

    // whether a tensor is an order that no matrix has any more, when all types are set
    bool is_unused(const ggml_tensor * t) const { return columns.count(t) > 0 && used.count(t) == 0; }

    // rows of a matrix as another type has them
    const float * apply(const ggml_tensor * w, ggml_type type, const float * x, int64_t nrows) {
        const auto order = orders.find(w);
        const bool from = tesseraq_has_order(w->type), to = tesseraq_has_order(type);
        if (order == orders.end() || from == to) {
            return x;
        }
        const std::vector<int32_t> & cols = columns.at(order->second);
        rows.resize(std::max(rows.size(), nrows*cols.size()));
        for (int64_t i = 0; i < nrows; i++) {
            const float * in  = x + i*cols.size();
            float       * out = rows.data() + i*cols.size();
            for (size_t j = 0; j < cols.size(); j++) {
                if (to) {
                    out[j] = in[cols[j]];
                } else {
                    out[cols[j]] = in[j];
                }
            }
        }
        return rows.data();
    }

    // the importance of the columns of a matrix, and of its experts, as another type has them
    const float * importance(const ggml_tensor * w, ggml_type type, const float * x) {
        if (x == nullptr || !tesseraq_has_order(type)) {
            return x;
        }
        const float * ordered = apply(w, type, x, w->ne[2]);
        if (ordered != x) {
            importances.assign(ordered, ordered + w->ne[0]*w->ne[2]);
            return importances.data();
        }
        return x;
    }

  private:
    std::unordered_map<const ggml_tensor *, ggml_tensor *> orders;
    std::unordered_map<const ggml_tensor *, std::vector<int32_t>> columns; // of an order
    std::set<const ggml_tensor *> used; // orders that some matrix of the new file has

    std::vector<float> rows, importances;
};
