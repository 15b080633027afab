// run DTYPE WIDTH STAGES ROWS IN OUT CLUSTERS SEED: one launch on the stand-in machine, judged against
// fp64. run … OFFSET,OFFSET,…: as many groups, each judged so; and each must equal, bit for bit, a
// launch of its own rows and parameters alone. The offsets are in device memory if SEED is even.
#include "machine.h"

#include "cuda/stitch_layer_norm_sm90.h"

using namespace snk::cuda::sm90;

namespace {

template <typename T>
struct Matrix {
  int rows, cols;
  std::vector<T> data;
  Matrix(int rows, int cols, double scale, std::mt19937& source) : rows(rows), cols(cols) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < rows * cols; ++i) data.push_back(T(float(scale * normal(source))));
  }
  double at(int i, int j) const { return float(data[size_t(i) * cols + j]); }
  void map(CUtensorMap& to, int tile_rows) const {
    machine::make_map(to, reinterpret_cast<const uint16_t*>(data.data()), rows, cols, tile_rows);
  }
};

// 16-byte aligned, NaN, with a guard behind it.
struct Output {
  std::vector<uint4> data;
  explicit Output(size_t bytes) : data(bytes / 16 + 2) {
    std::memset(data.data(), 0xff, data.size() * 16);
  }
  template <typename T>
  T at(size_t i) const {
    T value;
    std::memcpy(&value, reinterpret_cast<const char*>(data.data()) + i * sizeof(T), sizeof(T));
    return value;
  }
  bool guarded(size_t bytes) const {
    const auto* p = reinterpret_cast<const unsigned char*>(data.data());
    return std::all_of(p + bytes, p + data.size() * 16, [](unsigned char c) { return c == 0xff; });
  }
};

struct Case {
  int width, stages, rows, in, out, clusters, seed;
  std::vector<int64_t> offsets;  // none: one group of all rows
};

template <typename T>
struct Projection {
  Matrix<T> weight, bias;
  Matrix<float> norm_weight, norm_bias;
  Projection(int in, int out, std::mt19937& source)
      : weight(out, in, 1 / std::sqrt(in), source),
        bias(1, out, 3, source),
        norm_weight(1, out, 1, source),
        norm_bias(1, out, 1, source) {}
  // As the launcher does it (stitch_layer_norm_sm90.cu).
  void describe(int width, Group& group) const {
    weight.map(group.weight, width);
    const auto half = std::is_same_v<T, __half> ? snk::DType::f16 : snk::DType::bf16;
    group.bias = {bias.data.data(), half};
    group.norm_weight = {norm_weight.data.data(), snk::DType::f32};
    group.norm_bias = {norm_bias.data.data(), snk::DType::f32};
  }
};

struct Outputs {
  size_t rows, bytes;
  Output y, normed, mean, rstd;
  Outputs(int rows, int out)
      : rows(rows), bytes(size_t(rows) * out * 2), y(bytes), normed(bytes), mean(rows * 4),
        rstd(rows * 4) {}
  bool guarded() const {
    return y.guarded(bytes) && normed.guarded(bytes) && mean.guarded(rows * 4) &&
           rstd.guarded(rows * 4);
  }
  // Whether all outputs of these rows are those of the first rows of others.
  bool equal(size_t first, size_t count, const Outputs& others) const {
    const auto same = [&](const Output& a, const Output& b, size_t row_bytes) {
      const auto* p = reinterpret_cast<const char*>(a.data.data());
      return std::memcmp(p + first * row_bytes, b.data.data(), count * row_bytes) == 0;
    };
    const size_t row_bytes = bytes / rows;
    return same(y, others.y, row_bytes) && same(normed, others.normed, row_bytes) &&
           same(mean, others.mean, 4) && same(rstd, others.rstd, 4);
  }
};

constexpr float EPS = 1e-5f;

template <typename T, int WIDTH, int GROUPS>
Outputs launch(const Case& c, const Matrix<T>& x, const std::vector<const Projection<T>*>& own,
               const int64_t* offsets, int first_row, int rows) {
  Outputs to(rows, c.out);
  Arguments<GROUPS> p{};
  machine::make_map(p.x, reinterpret_cast<const uint16_t*>(&x.data[size_t(first_row) * c.in]), rows,
                    c.in, BAND);
  for (size_t i = 0; i < own.size(); ++i) own[i]->describe(WIDTH, p.group[i]);
  p.groups = int(own.size());
  if (c.seed % 2 == 0) p.offsets = offsets;
  else if (offsets != nullptr)
    for (int i = 0; i <= p.groups; ++i) p.known[i] = int(offsets[i]);
  p.y = to.y.data.data(), p.normed = to.normed.data.data();
  p.mean = reinterpret_cast<float*>(to.mean.data.data());
  p.rstd = reinterpret_cast<float*>(to.rstd.data.data());
  p.rows = rows, p.cols = c.out, p.slices = (c.out + WIDTH - 1) / WIDTH;
  p.steps = (c.in + STEP - 1) / STEP, p.stages = c.stages;
  machine::check(p.stages < 3 * p.steps, "stages for three bands");
  p.eps = EPS, p.per_column = 1.0f / c.out;
  machine::run([&] { stitch_layer_norm_sm90_kernel<T, WIDTH, GROUPS>(p); }, c.clusters * p.slices,
               p.slices, THREADS, Shared<WIDTH, GROUPS>::bytes(p.steps, p.stages, p.slices));
  machine::check(to.guarded(), "written behind an output");
  return to;
}

// Of each of y, mean, rstd and normed, the largest error over what rounding allows.
struct Judge {
  double worst[4] = {};
  void see(int what, double value, double expected, double allowed) {
    const double error = std::abs(value - expected) / allowed;
    if (!(error <= worst[what])) worst[what] = error;
  }
  template <typename T>
  void row(const Matrix<T>& x, int i, const Projection<T>& s, const Outputs& found) {
    const double ulp = std::is_same_v<T, __half> ? 1.0 / 2048 : 1.0 / 256;  // half of a unit at 1
    const int in = x.cols, out = s.weight.rows;
    double total = 0, squares = 0;
    for (int j = 0; j < out; ++j) {
      double expected = s.bias.at(0, j);
      for (int k = 0; k < in; ++k) expected += x.at(i, k) * s.weight.at(j, k);
      const double value = float(found.y.template at<T>(size_t(i) * out + j));
      see(0, value, expected, ulp * std::abs(expected) + 1e-4);
      total += value;
    }
    const double centre = total / out;
    for (int j = 0; j < out; ++j)
      squares += std::pow(float(found.y.template at<T>(size_t(i) * out + j)) - centre, 2);
    const double scale = 1 / std::sqrt(squares / out + EPS);
    see(1, found.mean.template at<float>(i), centre, 1e-5);
    see(2, found.rstd.template at<float>(i), scale, 1e-5 * scale);
    for (int j = 0; j < out; ++j) {
      const double value = float(found.y.template at<T>(size_t(i) * out + j));
      const double expected =
          (value - centre) * scale * s.norm_weight.at(0, j) + s.norm_bias.at(0, j);
      see(3, float(found.normed.template at<T>(size_t(i) * out + j)), expected,
          ulp * std::abs(expected) + 1e-4);
    }
  }
};

template <typename T, int WIDTH>
int run(const Case& c) {
  std::mt19937 source(c.seed);
  machine::random_source.seed(c.seed);
  const Matrix<T> x(c.rows, c.in, 1, source);
  std::vector<Projection<T>> own;
  for (size_t i = 0; i + 1 < std::max<size_t>(c.offsets.size(), 2); ++i)
    own.emplace_back(c.in, c.out, source);
  Judge judge;
  if (c.offsets.empty()) {
    const auto found = launch<T, WIDTH, 1>(c, x, {&own[0]}, nullptr, 0, c.rows);
    for (int i = 0; i < c.rows; ++i) judge.row(x, i, own[0], found);
  } else {
    std::vector<const Projection<T>*> all;
    for (const auto& projection : own) all.push_back(&projection);
    const auto found = launch<T, WIDTH, MAX_GROUPS>(c, x, all, c.offsets.data(), 0, c.rows);
    int next = 0;
    const auto untouched = [&](int stop) {
      for (; next < stop; ++next)
        machine::check(std::isnan(found.mean.template at<float>(next)), "wrote nobody's row");
    };
    for (size_t g = 0; g < all.size(); ++g) {
      const int start = int(std::clamp<int64_t>(c.offsets[g], 0, c.rows));
      const int stop = int(std::clamp<int64_t>(c.offsets[g + 1], 0, c.rows));
      if (start >= stop) continue;
      untouched(start);
      next = stop;
      for (int i = start; i < stop; ++i) judge.row(x, i, own[g], found);
      const auto alone = launch<T, WIDTH, 1>(c, x, {all[g]}, nullptr, start, stop - start);
      machine::check(found.equal(start, stop - start, alone), "not the bits of the group alone");
    }
    untouched(c.rows);
  }
  const auto& worst = judge.worst;
  std::printf("error over what rounding allows: y %.3f mean %.3f rstd %.3f normed %.3f\n", worst[0],
              worst[1], worst[2], worst[3]);
  return std::all_of(worst, worst + 4, [](double error) { return error <= 1.01; }) ? 0 : 1;
}

template <typename T>
int run_for_width(const Case& c) {
  switch (c.width) {
    case 64: return run<T, 64>(c);
    case 96: return run<T, 96>(c);
    case 128: return run<T, 128>(c);
  }
  machine::check(false, "no such width");
  return 1;
}

std::vector<int64_t> numbers(const char* text) {
  std::vector<int64_t> found;
  for (const char* at = text; *at != 0; at += *at == ',') {
    char* end;
    found.push_back(std::strtoll(at, &end, 10));
    machine::check(end != at, "a list of numbers is malformed");
    at = end;
  }
  return found;
}

}  // namespace

int main(int argc, char** argv) {
  machine::check(argc == 9 || argc == 10,
                 "run DTYPE WIDTH STAGES ROWS IN OUT CLUSTERS SEED [OFFSETS]");
  const auto number = [&](int i) { return std::atoi(argv[i]); };
  Case c{number(2), number(3), number(4), number(5), number(6), number(7), number(8), {}};
  if (argc == 10) c.offsets = numbers(argv[9]);
  return std::string(argv[1]) == "float16" ? run_for_width<__half>(c)
                                           : run_for_width<__nv_bfloat16>(c);
}
