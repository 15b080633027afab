// run DTYPE ROWS IN OUT RANK CLUSTERS SEED: one launch on the stand-in machine, judged against fp64.
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

template <typename T, int WIDTH, int RANK>
int run(int rows, int in, int out, int rank, int clusters, int seed) {
  std::mt19937 source(seed);
  machine::random_source.seed(seed);
  const Matrix<T> x(rows, in, 1, source), weight(out, in, 1 / std::sqrt(in), source);
  const int stored_rank = (rank + 7) / 8 * 8;
  const Matrix<T> A(rank, in, 1 / std::sqrt(in), source);
  Matrix<T> B(out, stored_rank, 1, source);
  for (int j = 0; j < out; ++j)
    for (int k = rank; k < stored_rank; ++k) B.data[j * stored_rank + k] = T(0.f);
  const Matrix<T> bias(1, out, 3, source);
  const Matrix<float> norm_weight(1, out, 1, source), norm_bias(1, out, 1, source);
  const size_t bytes = size_t(rows) * out * 2;
  Output y(bytes), normed(bytes), mean(rows * 4), rstd(rows * 4);

  Arguments p{};
  x.map(p.x, BAND);
  weight.map(p.weight, WIDTH);
  if (RANK > 0) A.map(p.lora_A, RANK), B.map(p.lora_B, WIDTH);
  const auto half = std::is_same_v<T, __half> ? snk::DType::f16 : snk::DType::bf16;
  p.bias = {bias.data.data(), half};
  p.norm_weight = {norm_weight.data.data(), snk::DType::f32};
  p.norm_bias = {norm_bias.data.data(), snk::DType::f32};
  p.y = y.data.data(), p.normed = normed.data.data();
  p.mean = reinterpret_cast<float*>(mean.data.data());
  p.rstd = reinterpret_cast<float*>(rstd.data.data());
  p.rows = rows, p.cols = out, p.k_steps = (in + TILE_K - 1) / TILE_K, p.slices = slices(out);
  p.scaling = 0.7f, p.eps = 1e-5f, p.per_column = 1.0f / out;
  machine::run([&] { stitch_layer_norm_sm90_kernel<T, WIDTH, RANK>(p); }, clusters * p.slices,
               p.slices, THREADS, Shared<WIDTH, RANK>::BYTES);

  const double ulp = std::is_same_v<T, __half> ? 1.0 / 2048 : 1.0 / 256;  // half of a unit at 1
  double worst[4] = {};
  const auto judge = [&](int what, double value, double expected, double allowed) {
    const double error = std::abs(value - expected) / allowed;
    if (!(error <= worst[what])) worst[what] = error;
  };
  for (int i = 0; i < rows; ++i) {
    std::vector<double> low(rank, 0.0);
    for (int r = 0; r < rank; ++r)
      for (int k = 0; k < in; ++k) low[r] += x.at(i, k) * A.at(r, k);
    double total = 0, squares = 0;
    for (int j = 0; j < out; ++j) {
      double expected = bias.at(0, j);
      for (int k = 0; k < in; ++k) expected += x.at(i, k) * weight.at(j, k);
      for (int r = 0; r < rank; ++r) expected += double(p.scaling) * low[r] * B.at(j, r);
      const double value = float(y.at<T>(size_t(i) * out + j));
      judge(0, value, expected, ulp * std::abs(expected) + 1e-4);
      total += value;
    }
    const double centre = total / out;
    for (int j = 0; j < out; ++j)
      squares += std::pow(float(y.at<T>(size_t(i) * out + j)) - centre, 2);
    const double scale = 1 / std::sqrt(squares / out + p.eps);
    judge(1, mean.at<float>(i), centre, 1e-5);
    judge(2, rstd.at<float>(i), scale, 1e-5 * scale);
    for (int j = 0; j < out; ++j) {
      const double expected = (float(y.at<T>(size_t(i) * out + j)) - centre) * scale *
                                  norm_weight.at(0, j) + norm_bias.at(0, j);
      judge(3, float(normed.at<T>(size_t(i) * out + j)), expected, ulp * std::abs(expected) + 1e-4);
    }
  }
  std::printf("error over what rounding allows: y %.3f mean %.3f rstd %.3f normed %.3f\n", worst[0],
              worst[1], worst[2], worst[3]);
  machine::check(y.guarded(bytes) && normed.guarded(bytes) && mean.guarded(rows * 4) &&
                     rstd.guarded(rows * 4), "written behind an output");
  return std::all_of(worst, worst + 4, [](double error) { return error <= 1.01; }) ? 0 : 1;
}

template <typename T, int WIDTH>
int run_for_rank(const int* a) {
  const int rank = a[3];
  if (rank == 0) return run<T, WIDTH, 0>(a[0], a[1], a[2], a[3], a[4], a[5]);
  if (rank <= 16) return run<T, WIDTH, 16>(a[0], a[1], a[2], a[3], a[4], a[5]);
  return run<T, WIDTH, 64>(a[0], a[1], a[2], a[3], a[4], a[5]);
}
template <typename T>
int run_for_width(const int* a) {
  return slice_width(a[2]) == 192 ? run_for_rank<T, 192>(a) : run_for_rank<T, 256>(a);
}

}  // namespace

int main(int argc, char** argv) {
  machine::check(argc == 8, "run DTYPE ROWS IN OUT RANK CLUSTERS SEED");
  int numbers[6];
  for (int i = 0; i < 6; ++i) numbers[i] = std::atoi(argv[i + 2]);
  return std::string(argv[1]) == "float16" ? run_for_width<__half>(numbers)
                                           : run_for_width<__nv_bfloat16>(numbers);
}
