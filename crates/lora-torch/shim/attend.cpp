// FlashAttention's arithmetic (Dao, 2023, algorithms 1 and 2) with whole rows of scores: a block of queries and all keys that
// it sees fit the caches at the lengths that are trained on a CPU, so that no row is rescaled.
#include "attend.h"
#include "buffer.h"
#include "kernels.h"
#include <ATen/Parallel.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <vector>

namespace attend {

namespace {

constexpr int64_t BLOCK = 48;         // queries at a time: whole tiles of every kernel, and eighths
constexpr int64_t SLICE = 4 * BLOCK;  // queries of one head that a thread computes before it looks for others

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A matrix as the right operand of products: column tiles, one after the other, each [depth, kernel.cols].
struct Panels {
  Buffer buffer;
  float* data = nullptr;
  int64_t depth = 0;

  void straight(const sgemm::Kernel& k, const float* w, int64_t stride, int64_t rows, int64_t cols) {
    room(k, rows, cols);
    sgemm::pack_straight(w, stride, cols, rows, k.cols, data, rows * k.cols);
  }
  // Of the transpose: `rows` of w become columns.
  void turned(const sgemm::Kernel& k, const float* w, int64_t stride, int64_t rows, int64_t cols) {
    room(k, cols, rows);
    for (int64_t i = 0; i < rows; i += k.cols)
      sgemm::pack_transposed(w + i * stride, stride, std::min(k.cols, rows - i), cols, k.cols, data + i * cols);
  }

 private:
  void room(const sgemm::Kernel& k, int64_t depth_, int64_t cols) {
    depth = depth_;
    data = buffer.of(depth * up(cols, k.cols));
  }
};

// c [m, n] = start + rows [m, depth] times the columns of the panels from `col` on (a multiple of a tile), from their row
// `row` on.
void multiply(const sgemm::Kernel& k, const float* rows, int64_t stride, int64_t m, int64_t depth, const Panels& panels, int64_t row,
              int64_t col, int64_t n, float* c, int64_t c_stride, sgemm::Start start) {
  static const float none[sgemm::MOST_COLS] = {};
  for (int64_t j = 0; j < n; j += k.cols) {
    sgemm::Span span{rows, stride, depth, panels.data + (col + j) * panels.depth + row * k.cols, k.cols};
    for (int64_t i = 0; i < m; i += k.rows) {
      span.rows = rows + i * stride;
      k.tile(&span, 1, std::min(k.rows, m - i), c + i * c_stride + j, c_stride, std::min(k.cols, n - j), start, none);
    }
  }
}

// What a thread computes in.
struct Scratch {
  Panels queries, grads;
  Buffer query, grad, scores, slopes, turned;
};

// One segment and one head of keys, with the queries that read it, in the order in which they are computed: what several give to one key
// is summed in this order.
struct Part {
  const Rule& rule;
  int64_t begin, len, heads, kv, head, groups, d;
  Panels keys_turned, keys, values_turned, values;
  int64_t group = 0, at = 0;  // where the next slice of queries begins

  bool begun() const { return group > 0 || at > 0; }
  bool done() const { return group == groups; }
  void forget() { keys_turned = Panels(), keys = Panels(), values_turned = Panels(), values = Panels(); }
  int64_t left() const { return ((groups - group) * len - at) * len; }

  int64_t of_query(int64_t i, int64_t group) const { return ((begin + i) * heads + head * groups + group) * d; }
  int64_t of_key(int64_t j) const { return ((begin + j) * kv + head) * d; }

  // Keys that some query of [i0, i1) sees, from the beginning of a tile on.
  int64_t first(int64_t i0) const { return rule.window > 0 ? std::max<int64_t>(0, i0 - rule.window + 1) / sgemm::MOST_COLS * sgemm::MOST_COLS : 0; }
  int64_t last(int64_t i1) const { return rule.causal ? i1 : len; }
  // Keys that one query sees.
  int64_t low(int64_t i) const { return rule.window > 0 ? std::max<int64_t>(0, i - rule.window + 1) : 0; }
  int64_t high(int64_t i) const { return rule.causal ? i + 1 : len; }
};

// Zeros for the keys that a query does not see, in a row of scores of the keys [from, to).
void hide(float* row, int64_t from, int64_t low, int64_t high, int64_t to) {
  std::memset(row, 0, (low - from) * sizeof(float));
  std::memset(row + (high - from), 0, (to - high) * sizeof(float));
}

// Calls `body` for each slice of queries, by as many threads as there are, each with its own scratch. Whoever is free takes the part
// with the most work left: all of it while there are many parts, then a slice.
template <typename Body>
void over_parts(const at::Tensor& q, const at::Tensor& k, at::IntArrayRef lens, const Rule& rule, const Body& body) {
  std::vector<Part> parts;
  const int64_t heads = q.size(1), kv = k.size(1), d = q.size(2);
  int64_t begin = 0;
  for (const int64_t len : lens) {
    for (int64_t head = 0; head < kv && len > 0; ++head) parts.push_back({rule, begin, len, heads, kv, head, heads / kv, d});
    begin += len;
  }
  const auto less = [](const Part* a, const Part* b) { return a->left() < b->left(); };
  std::vector<Part*> waiting;
  for (Part& part : parts) waiting.push_back(&part);
  std::make_heap(waiting.begin(), waiting.end(), less);
  std::mutex lock;
  const int64_t threads = at::get_num_threads();
  const auto take = [&](Part*& part, bool& whole) {
    const std::lock_guard<std::mutex> held(lock);
    if (waiting.empty()) return false;
    whole = int64_t(waiting.size()) > 4 * threads;
    std::pop_heap(waiting.begin(), waiting.end(), less);
    part = waiting.back();
    waiting.pop_back();
    return true;
  };
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch scratch;
    Part* part;
    for (bool whole; take(part, whole);) {
      do {
        const int64_t end = std::min(part->len, part->at + SLICE);
        body(*part, end, scratch);
        part->at = end % part->len;
        part->group += end == part->len;
      } while (whole && !part->done());
      if (part->done()) {
        part->forget();
        continue;
      }
      const std::lock_guard<std::mutex> held(lock);
      waiting.push_back(part);
      std::push_heap(waiting.begin(), waiting.end(), less);
    }
  });
}

// Rows a page apart would fall on the same lines of the caches.
int64_t score_stride(const Part& p) {
  const int64_t stride = up(p.len, 16);
  return stride % 1024 ? stride : stride + 16;
}

// Rows of one head, one behind the other.
const float* gathered(Buffer& buffer, const float* rows, int64_t stride, int64_t m, int64_t d) {
  float* to = buffer.of(m * d);
  for (int64_t i = 0; i < m; ++i) std::memcpy(to + i * d, rows + i * stride, d * sizeof(float));
  return to;
}

}  // namespace

void forward(const sgemm::Kernel& kernel, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, at::IntArrayRef lens,
             const Rule& rule, at::Tensor& out_, at::Tensor& lse_) {
  const float *q = q_.data_ptr<float>(), *k = k_.data_ptr<float>(), *v = v_.data_ptr<float>();
  float *out = out_.data_ptr<float>(), *lse = lse_.data_ptr<float>();
  const kernel::Rows<float>& loops = kernel::rows<float>();
  over_parts(q_, k_, lens, rule, [&](Part& p, int64_t end, Scratch& s) {
    const int64_t d = p.d, group = p.group, key_stride = p.kv * d, query_stride = p.heads * d, stride = score_stride(p);
    if (!p.begun()) {
      p.keys_turned.turned(kernel, k + p.of_key(0), key_stride, p.len, d);
      p.values.straight(kernel, v + p.of_key(0), key_stride, p.len, d);
    }
    float* scores = s.scores.of(BLOCK * stride);
    for (int64_t i0 = p.at; i0 < end; i0 += BLOCK) {
      const int64_t m = std::min(BLOCK, end - i0), from = p.first(i0), to = p.last(i0 + m);
      const float* query = gathered(s.query, q + p.of_query(i0, group), query_stride, m, d);
      multiply(kernel, query, d, m, d, p.keys_turned, 0, from, to - from, scores, stride, sgemm::Start::Zero);
      float sums[BLOCK];
      for (int64_t i = 0; i < m; ++i) {
        const int64_t low = p.low(i0 + i), high = p.high(i0 + i);
        float* row = scores + i * stride;
        hide(row, from, low, high, to);
        float top;
        sums[i] = loops.exp_sum(row + (low - from), high - low, float(rule.scale), &top);
        lse[(p.begin + i0 + i) * p.heads + p.head * p.groups + group] = top + std::log(sums[i]);
      }
      float* o = out + p.of_query(i0, group);
      multiply(kernel, scores, stride, m, to - from, p.values, from, 0, d, o, query_stride, sgemm::Start::Zero);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < d; ++j) o[i * query_stride + j] /= sums[i];
    }
  });
}

void backward(const sgemm::Kernel& kernel, const at::Tensor& g_, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_,
              const at::Tensor& out_, const at::Tensor& lse_, at::IntArrayRef lens, const Rule& rule, at::Tensor& gq_,
              at::Tensor& gk_, at::Tensor& gv_) {
  const float *g = g_.data_ptr<float>(), *q = q_.data_ptr<float>(), *k = k_.data_ptr<float>(), *v = v_.data_ptr<float>();
  const float *out = out_.data_ptr<float>(), *lse = lse_.data_ptr<float>();
  float *gq = gq_.data_ptr<float>(), *gk = gk_.zero_().data_ptr<float>(), *gv = gv_.zero_().data_ptr<float>();
  const kernel::Rows<float>& loops = kernel::rows<float>();
  over_parts(q_, k_, lens, rule, [&](Part& p, int64_t end, Scratch& s) {
    const int64_t d = p.d, group = p.group, key_stride = p.kv * d, query_stride = p.heads * d, stride = score_stride(p);
    if (!p.begun()) {
      p.keys_turned.turned(kernel, k + p.of_key(0), key_stride, p.len, d);
      p.keys.straight(kernel, k + p.of_key(0), key_stride, p.len, d);
      p.values_turned.turned(kernel, v + p.of_key(0), key_stride, p.len, d);
    }
    float *scores = s.scores.of(BLOCK * stride), *slopes = s.slopes.of(BLOCK * stride), *turned = s.turned.of(BLOCK * stride);
    for (int64_t i0 = p.at; i0 < end; i0 += BLOCK) {
      const int64_t m = std::min(BLOCK, end - i0), from = p.first(i0), to = p.last(i0 + m), width = to - from;
      const int64_t at = p.of_query(i0, group), into = p.of_key(from);
      const float *query = gathered(s.query, q + at, query_stride, m, d), *grad = gathered(s.grad, g + at, query_stride, m, d);
      multiply(kernel, query, d, m, d, p.keys_turned, 0, from, width, scores, stride, sgemm::Start::Zero);
      multiply(kernel, grad, d, m, d, p.values_turned, 0, from, width, slopes, stride, sgemm::Start::Zero);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t low = p.low(i0 + i), high = p.high(i0 + i), of_row = at + i * query_stride;
        float delta = 0;
        for (int64_t j = 0; j < d; ++j) delta += grad[i * d + j] * out[of_row + j];
        hide(scores + i * stride, from, low, high, to);
        hide(slopes + i * stride, from, low, high, to);
        const int64_t seen = i * stride + low - from;
        loops.softmax_slopes(scores + seen, slopes + seen, high - low, float(rule.scale),
                             lse[(p.begin + i0 + i) * p.heads + p.head * p.groups + group], delta);
      }
      multiply(kernel, slopes, stride, m, width, p.keys, from, 0, d, gq + at, query_stride, sgemm::Start::Zero);
      // What the keys get sums over queries: the blocks are turned over. Rows beyond m are turned too, and read by nobody.
      const int64_t eighths = up(m, 8);
      s.grads.straight(kernel, grad, d, m, d);
      sgemm::pack_transposed(scores, stride, eighths, width, eighths, turned);
      multiply(kernel, turned, eighths, width, m, s.grads, 0, 0, d, gv + into, key_stride, sgemm::Start::Sum);
      s.queries.straight(kernel, query, d, m, d);
      sgemm::pack_transposed(slopes, stride, eighths, width, eighths, turned);
      multiply(kernel, turned, eighths, width, m, s.queries, 0, 0, d, gk + into, key_stride, sgemm::Start::Sum);
    }
  });
}

}  // namespace attend
