// Every CUDA kernel on small problems, against loops in float64, without torch: for the sanitizers, which
// test_cuda_kernels.py compiles this with. An argument names a fault to commit instead, which must be found.
#include <cfloat>
#include <random>
#include <string>

#include "../../csrc/cuda/block_factor.cu"
#include "../../csrc/cuda/gram.cu"
#include "../../csrc/cuda/group_saliency.cu"
#include "../../csrc/cuda/inverse_diagonal.cu"
#include "../../csrc/cuda/inverse_product.cu"
#include "../../csrc/cuda/select_smallest.cu"

using namespace mfac::cuda;
template <typename T>
using Vector = std::vector<T>;

namespace {

std::mt19937 random_bits(0);
int failures = 0;

double normal() { return std::normal_distribution<double>()(random_bits); }

void expect(const char* what, double got, double right, double tolerance = 1e-10) {
  if (std::abs(got - right) <= tolerance * std::max(1.0, std::abs(right))) return;
  std::fprintf(stderr, "%s: got %.17g, expected %.17g\n", what, got, right);
  ++failures;
}

// G of m gradients of d weights, in blocks of B columns of which `active` are in use, listed as the ops do.
struct Problem {
  int64_t m, d, block_size, blocks;
  Vector<float> values;
  Vector<char> active;
  Vector<int32_t> columns, ids;
  Vector<int64_t> offsets;
  Gradients<float> grads;
  Layout layout;

  Problem(int64_t gradients, int64_t weights, int64_t size)
      : m(gradients),
        d(weights),
        block_size(size),
        blocks((d + size - 1) / size),
        values(m * d),
        active(d),
        ids(blocks),
        offsets(1, 0) {
    for (float& value : values) value = static_cast<float>(normal());
    for (char& flag : active) flag = random_bits() % 4 > 0;
    std::iota(ids.begin(), ids.end(), 0);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t c = b * size; c < std::min(d, (b + 1) * size); ++c)
        if (active[c]) columns.push_back(static_cast<int32_t>(c - b * size));
      offsets.push_back(static_cast<int64_t>(columns.size()));
    }
    grads = {values.data(), m, d, d};
    layout = {d, size, columns.data(), offsets.data()};
  }
  int64_t in_use(int64_t block) const { return offsets[block + 1] - offsets[block]; }
  Tile tile() const {
    int64_t width = 0;
    for (int64_t b = 0; b < blocks; ++b) width = std::max(width, in_use(b));
    return {ids.data(), blocks, 0, width};
  }
  double g(int64_t r, int64_t block, int64_t i) const {
    return i < in_use(block) ? values[r * d + block * block_size + columns[offsets[block] + i]] : 0.0;
  }
};

void test_blocks(int64_t m, int64_t d, int64_t block_size) {
  const Problem p(m, d, block_size);
  const Tile tile = p.tile();
  const int64_t width = tile.width, count = tile.count;
  Vector<double> packed(count * m * width);
  Vector<BFloat16> parts(2 * packed.size());
  pack(p.grads, p.layout, tile, packed.data(), nullptr);
  pack(p.grads, p.layout, tile, 2, parts.data(), nullptr);
  for (int64_t i = 0; i < static_cast<int64_t>(packed.size()); ++i) {
    expect("pack", packed[i], p.g(i / width % m, i / width / m, i % width), 0);
    const double sum = to_float(parts[i]) + static_cast<double>(to_float(parts[i + packed.size()]));
    expect("pack in parts", sum, packed[i], 0x1p-16);
  }

  // A = G Gᵀ, its factor, L⁻¹ and L⁻¹ G of every block, by loops
  const double damping = 0.1, ridge = damping * static_cast<double>(m);
  Vector<double> a(count * m * m), l(a), inverse(a), solved(packed.size()), form(a);
  for (int64_t b = 0; b < count; ++b)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < m; ++j)
        for (int64_t c = 0; c < width; ++c)
          a[(b * m + i) * m + j] += packed[(b * m + i) * width + c] * packed[(b * m + j) * width + c];
  gram(p.grads, p.layout, tile, true, m, form.data(), nullptr);
  for (int64_t i = 0; i < count * m * m; ++i)
    if (i % m <= i / m % m) expect("gram, capacitance side", form[i], a[i]);
  Vector<double> fisher(count * width * width);
  gram(p.grads, p.layout, tile, false, width, fisher.data(), nullptr);
  for (int64_t b = 0; b < count; ++b)
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        double right = 0;
        for (int64_t r = 0; r < m; ++r) right += packed[(b * m + r) * width + i] * packed[(b * m + r) * width + j];
        expect("gram, Fisher side", fisher[(b * width + i) * width + j], right);
      }
  int32_t failed = 0;
  cholesky(form.data(), count, m, ridge, 0x1p-52, p.ids.data(), l.data(), inverse.data(), &failed, nullptr);
  expect("failed", failed, 0);
  for (int64_t b = 0; b < count; ++b)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < m; ++j) {
        double product = 0, unit = 0;
        for (int64_t k = 0; k < m; ++k) {
          product += l[(b * m + i) * m + k] * l[(b * m + j) * m + k];
          unit += l[(b * m + i) * m + k] * inverse[(b * m + k) * m + j];
        }
        expect("cholesky", product, a[(b * m + i) * m + j] + (i == j ? ridge : 0));
        expect("inverse", unit, i == j ? 1 : 0);
      }
  Vector<double> bad{1, 2, 2, 1};  // eigenvalues 3 and -1
  cholesky(bad.data(), 1, 2, 0.0, 0x1p-52, p.ids.data(), form.data(), nullptr, &failed, nullptr);
  expect("not definite, whatever the rounding", failed, 1);

  for (int64_t b = 0; b < count; ++b)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < width; ++c)
        for (int64_t k = 0; k <= i; ++k)
          solved[(b * m + i) * width + c] += inverse[(b * m + i) * m + k] * packed[(b * m + k) * width + c];
  Vector<float> diagonal(d, -1.0f);
  diagonal_of_solved(p.grads, p.layout, tile, solved.data(), m, damping, true, diagonal.data(), nullptr);

  Vector<float> solved_at_once(d, -1.0f);
  capacitance_diagonal(p.grads, p.layout, tile, inverse.data(), damping, solved_at_once.data(), nullptr);
  for (int64_t c = 0; c < d; ++c) expect("capacitance_diagonal", solved_at_once[c], diagonal[c], 1e-6);

  // F⁻¹ x by the pieces of inverse_product, and its diagonal from unit vectors
  constexpr int64_t k = 5;
  Vector<double> x(k * d), t(k * count * m), products(k * d);
  for (double& value : x) value = normal();
  for (int64_t v = 0; v < k; ++v)
    for (int64_t c = 0; c < d; ++c) x[v * d + c] *= p.active[c];
  multiply_rows(p.grads, p.layout, tile, x.data(), k, t.data(), nullptr);
  for (int64_t i = 0; i < static_cast<int64_t>(t.size()); ++i) {
    const int64_t r = i % m, b = i / m % count, v = i / m / count;
    double right = 0;
    for (int64_t c = b * block_size; c < std::min(d, (b + 1) * block_size); ++c)
      right += static_cast<double>(p.values[r * d + c]) * x[v * d + c];
    expect("multiply_rows", t[i], right);
  }
  Vector<double> y = t;
  cholesky_solve(l.data(), count, m, k, y.data(), nullptr);
  for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
    double product = i % m < m ? ridge * y[i] : 0;
    for (int64_t j = 0; j < m; ++j) product += a[(i / m % count * m + i % m) * m + j] * y[i / m * m + j];
    expect("cholesky_solve", product, t[i], 1e-9);
  }
  multiply_columns(p.grads, p.layout, tile, y.data(), k, products.data(), nullptr);
  for (int64_t i = 0; i < k * d; ++i) {
    const int64_t c = i % d, b = c / block_size, v = i / d;
    double right = 0;
    for (int64_t r = 0; r < m; ++r) right += p.values[r * d + c] * y[(v * count + b) * m + r];
    expect("multiply_columns", products[i], right);
  }
  for (int64_t c = 0; c < d; ++c) {
    if (!p.active[c]) {
      expect("a column not in use", diagonal[c], -1, 0);
      continue;
    }
    double norm = 0;
    const int64_t b = c / block_size;
    for (int64_t i = 0; i < m; ++i) {
      double z = 0;
      for (int64_t r = 0; r <= i; ++r) z += inverse[(b * m + i) * m + r] * p.values[r * d + c];
      norm += z * z;
    }
    expect("inverse_diagonal", diagonal[c], (1 - norm) / damping, 1e-5);
  }

  Vector<double> gathered(k * count * width), scattered(k * d, 7.0);
  gather(p.layout, tile, x.data(), k, gathered.data(), nullptr);
  scatter(p.layout, tile, gathered.data(), k, 2.0, scattered.data(), nullptr);
  for (int64_t i = 0; i < k * d; ++i) expect("gather, scatter", scattered[i], p.active[i % d] ? 2 * x[i] : 7.0, 0);

  // Groups of four neighbours; the third place of each is absent
  constexpr int64_t size = 4;
  const int64_t groups = width / size;
  const Vector<int64_t> members{0, 1, 0, 3, 2, 3};  // three subsets of two
  Vector<int32_t> table(groups * size), owner(groups, 0);
  Vector<float> w(groups * size);
  for (int64_t i = 0; i < groups * size; ++i) {
    table[i] = i % size == 2 ? -1 : static_cast<int32_t>(i);
    w[i] = static_cast<float>(normal());
  }
  Vector<double> costs(groups * 3);
  group_saliency({table.data(), owner.data(), 0, 0, w.data(), groups, size, members.data(), 3, 2}, solved.data(), m,
                 width, damping, m, true, nullptr, costs.data(), nullptr);
  const auto element = [&](int64_t i, int64_t j) {
    double dot = 0;
    for (int64_t r = 0; r < m; ++r) dot += solved[r * width + i] * solved[r * width + j];
    return ((i == j) - dot) / damping;
  };
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t at = group * size;
    const double u = w[at], v = w[at + 1], last = w[at + 3];
    expect("group_saliency, one there", costs[group * 3 + 2], last * last / element(at + 3, at + 3) / 2);
    const double e = element(at, at), f = element(at, at + 1), h = element(at + 1, at + 1);
    const double two = (u * u * h - 2 * u * v * f + v * v * e) / (e * h - f * f) / 2;
    expect("group_saliency, two", costs[group * 3], two, 1e-8);
  }
}

void test_selection(int64_t n, int64_t distinct, bool bounded) {
  Vector<float> scores(n), weights(n, 1.0f);
  for (float& score : scores)
    score = distinct ? static_cast<float>(random_bits() % distinct) - 1 : static_cast<float>(normal());
  const int64_t k = n / 3;
  Vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return scores[i] < scores[j]; });
  const Bounds bounds = bounded ? Bounds{order_key(scores[order[k / 2]]), order_key(scores[order[k + (n - k) / 2]])}
                                : Bounds{0, UINT32_MAX};
  Found found{0, 0, static_cast<unsigned long long>(n)};
  Vector<uint32_t> inside(n);
  count_scores(scores.data(), n, bounds, inside.data(), n, &found, nullptr);
  Vector<unsigned long long> histogram(kRadixBins + 2), cut(3), again(3);
  const int64_t left = k - static_cast<int64_t>(found.below);
  find_cut(inside.data(), nullptr, static_cast<int64_t>(found.inside), bounds, left, histogram.data(), cut.data(),
           nullptr);
  find_cut(nullptr, scores.data(), n, bounds, left, histogram.data(), again.data(), nullptr);
  for (int i = 0; i < 3; ++i) expect("find_cut", static_cast<double>(cut[i]), static_cast<double>(again[i]), 0);
  Vector<int32_t> ties(tie_chunks(n));
  Vector<int64_t> before(ties.size());
  count_ties(scores.data(), n, static_cast<uint32_t>(cut[0]), ties.data(), nullptr);
  for (size_t i = 1; i < ties.size(); ++i) before[i] = before[i - 1] + ties[i - 1];
  Vector<char> kept(n, 2);
  write_mask(scores.data(), n, static_cast<uint32_t>(cut[0]), static_cast<int64_t>(cut[2]),
             cut[1] == cut[2] ? nullptr : before.data(), reinterpret_cast<bool*>(kept.data()), weights.data(), nullptr);
  for (int64_t i = 0; i < n; ++i) expect("mask", kept[order[i]], i >= k, 0);
  for (int64_t i = 0; i < n; ++i) expect("weights", weights[i], kept[i], 0);
  Vector<float> sample(100);
  sample_scores(scores.data(), n, 100, sample.data(), nullptr);
  for (const float score : sample)
    expect("sample", static_cast<double>(std::count(scores.begin(), scores.end(), score) > 0), 1);
}

// Both ways of a step of a product by a warp; the emulated kernels never take the second.
void products_kernel(double* out) {
  double one[2][4][4] = {}, other[2][4][4] = {}, a[2][4], b[4][2];
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) {
    a[i / 4][i % 4] = (lane * 7 + i * 3) % 11 - 5;
    b[i / 2][i % 2] = (lane * 5 + i * 2) % 13 - 6;
  }
  tensor_multiply_add(one, a, b);
  shuffled_multiply_add(other, a, b);
  for (int i = 0; i < 32; ++i) {
    out[lane * 32 + i] = one[i / 16][i / 4 % 4][i % 4];
    out[(32 + lane) * 32 + i] = other[i / 16][i / 4 % 4][i % 4];
  }
}

// a bᵀ by the table of tensor_multiply_add in csrc/cuda/device.cuh.
void test_products() {
  Vector<double> out(2 * 32 * 32);
  launch(products_kernel, 1, 32, 0, nullptr, out.data());
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 32; ++i) {
      const int row = 16 * (i / 16) + i % 4 / 2 * 8 + lane / 4, column = 8 * (i / 4 % 4) + lane % 4 * 2 + i % 2;
      double right = 0;
      for (int k = 0; k < 8; ++k) {
        const int from = row % 8 * 4 + k % 4, to = column % 8 * 4 + k % 4;
        const int at = row / 16 * 4 + k / 4 * 2 + row / 8 % 2, of = column / 8 * 2 + k / 4;
        right += ((from * 7 + at * 3) % 11 - 5) * ((to * 5 + of * 2) % 13 - 6);
      }
      expect("tensor_multiply_add", out[lane * 32 + i], right, 0);
      expect("shuffled_multiply_add", out[(32 + lane) * 32 + i], right, 0);
    }
}

// Faults: threads of a block, threads of two blocks, writing beyond the end, and threads that do not all reach a
// barrier.
void race_kernel(int* out, bool between_blocks) {
  if (threadIdx.x == (between_blocks ? 0 : blockIdx.x == 0 ? 0 : 64)) out[0] = 1;
  if (!between_blocks && threadIdx.x == 1) out[0] += 1;
}
void overflow_kernel() { shared<char[64]>()[threadIdx.x] = 1; }
void barrier_kernel() {
  if (threadIdx.x < 32) __syncthreads();
}

}  // namespace

int main(int count, char** arguments) {
  const std::string fault = count > 1 ? arguments[1] : "";
  int out = 0;
  if (fault == "race") launch(race_kernel, 1, 64, 0, nullptr, &out, false);
  if (fault == "race between blocks") launch(race_kernel, 2, 64, 0, nullptr, &out, true);
  if (fault == "overflow") launch(overflow_kernel, 1, 96, 64, nullptr);
  if (fault == "barrier") launch(barrier_kernel, 1, 64, 0, nullptr);
  if (!fault.empty()) return 0;
  test_products();
  test_blocks(7, 100, 40);
  test_blocks(34, 60, 60);  // more than a tile of the factorisation
  test_blocks(65, 70, 70);  // more than a tile of a block of threads
  for (const int64_t n : {33, 5000, 9001})
    for (const int64_t distinct : {0, 3}) test_selection(n, distinct, n == 5000);
  std::printf("%d failures\n", failures);
  return failures > 0;
}
