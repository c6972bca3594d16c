// The 3x3 convolution (stride 1, padding 1) by Winograd's F(4x4, 3x3), float32: see winograd.py. Images are NHWC.
// A tile is 4x4 outputs, made from 6x6 inputs; its 36 transformed values are multiplied by 36 transformed weights, each
// a matrix product over channels. Each thread takes a share of the images, and of these a few at a time, so that their
// tiles stay in the cache: threads that met after every step would wait where another process has one of the cores.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t CACHE = 2'400'000;  // bytes of transformed tiles at a time, for each thread

// Images a..b of (N, H, W, C) and their tiles.
struct Part {
  int64_t a, b, H, W, C;
  int64_t tiles() const { return (b - a) * (H / 4) * (W / 4); }

  // action(t, n, i, j): tile t covers the outputs from row i and column j on of image n.
  template <class Action>
  void each_tile(Action action) const {
    std::vector<float> buffer(36 * C);
    for (int64_t t = 0; t < tiles(); t++) {
      int64_t down = t / (W / 4);
      action(t, a + down / (H / 4), down % (H / 4) * 4, t % (W / 4) * 4, buffer.data());
    }
  }
};

// Six values a step `in` apart to six a step `out` apart, for C channels: B^T d.
void inputs_six(const float* const* d, float* __restrict o, int64_t out, int64_t C) {
  const float *__restrict d0 = d[0], *__restrict d1 = d[1], *__restrict d2 = d[2];
  const float *__restrict d3 = d[3], *__restrict d4 = d[4], *__restrict d5 = d[5];
#pragma GCC ivdep
  for (int64_t c = 0; c < C; c++) {
    float s = d4[c] - 4 * d2[c], u = d3[c] - 4 * d1[c], v = d4[c] - d2[c], q = 2 * (d3[c] - d1[c]);
    o[c] = 4 * d0[c] - 5 * d2[c] + d4[c];
    o[out + c] = s + u;
    o[2 * out + c] = s - u;
    o[3 * out + c] = v + q;
    o[4 * out + c] = v - q;
    o[5 * out + c] = 4 * d1[c] - 5 * d3[c] + d5[c];
  }
}

// A^T m: six to four.
void outputs_four(const float* __restrict m, int64_t in, float* __restrict o, int64_t out, int64_t C) {
#pragma GCC ivdep
  for (int64_t c = 0; c < C; c++) {
    float m1 = m[in + c], m2 = m[2 * in + c], m3 = m[3 * in + c], m4 = m[4 * in + c];
    float p = m1 + m2, q = m1 - m2, u = m3 + m4, v = m3 - m4;
    o[c] = m[c] + p + u;
    o[out + c] = q + 2 * v;
    o[2 * out + c] = p + 4 * u;
    o[3 * out + c] = q + 8 * v + m[5 * in + c];
  }
}

// A y: four to six.
void gradients_six(const float* __restrict y, int64_t in, float* __restrict o, int64_t out, int64_t C) {
#pragma GCC ivdep
  for (int64_t c = 0; c < C; c++) {
    float y0 = y[c], y1 = y[in + c], y2 = y[2 * in + c], y3 = y[3 * in + c];
    float p = y0 + y2, q = y1 + y3, u = y0 + 4 * y2, v = 2 * y1 + 8 * y3;
    o[c] = y0;
    o[out + c] = p + q;
    o[2 * out + c] = p - q;
    o[3 * out + c] = u + v;
    o[4 * out + c] = u - v;
    o[5 * out + c] = y3;
  }
}

// V (36, tiles, C) = B^T x B
void transform_inputs(const float* x, const Part& part, float* V) {
  int64_t C = part.C, step = part.tiles() * C;
  std::vector<float> zeros(C, 0.f);
  part.each_tile([&](int64_t t, int64_t n, int64_t i, int64_t j, float* buffer) {
    for (int r = 0; r < 6; r++) {
      const float* d[6];
      for (int k = 0; k < 6; k++) {
        int64_t h = i + r - 1, w = j + k - 1;
        bool inside = h >= 0 && h < part.H && w >= 0 && w < part.W;
        d[k] = inside ? x + ((n * part.H + h) * part.W + w) * C : zeros.data();
      }
      inputs_six(d, buffer + r * 6 * C, C, C);
    }
    for (int k = 0; k < 6; k++) {
      const float* d[6];
      for (int r = 0; r < 6; r++) d[r] = buffer + (r * 6 + k) * C;
      inputs_six(d, V + k * step + t * C, 6 * step, C);
    }
  });
}

// y = A^T M A of M (36, tiles, C)
void transform_outputs(const float* M, const Part& part, float* y) {
  int64_t C = part.C, step = part.tiles() * C;
  part.each_tile([&](int64_t t, int64_t n, int64_t i, int64_t j, float* buffer) {
    for (int r = 0; r < 6; r++) outputs_four(M + r * 6 * step + t * C, step, buffer + r * 4 * C, C, C);
    for (int k = 0; k < 4; k++)
      outputs_four(buffer + k * C, 4 * C, y + ((n * part.H + i) * part.W + j + k) * C, part.W * C, C);
  });
}

// M (36, tiles, C) = A dy A^T
void transform_gradients(const float* dy, const Part& part, float* M) {
  int64_t C = part.C, step = part.tiles() * C;
  part.each_tile([&](int64_t t, int64_t n, int64_t i, int64_t j, float* buffer) {
    for (int k = 0; k < 4; k++)
      gradients_six(dy + ((n * part.H + i) * part.W + j + k) * C, part.W * C, buffer + k * C, 4 * C, C);
    for (int r = 0; r < 6; r++) gradients_six(buffer + r * 4 * C, C, M + r * 6 * step + t * C, step, C);
  });
}

// action(a, b, V, M): images a..b of from..to, with room for the tiles of both sides.
template <class Action>
void each_part(int64_t from, int64_t to, int64_t tiles, int64_t C, int64_t K, const at::TensorOptions& options, Action action) {
  int64_t images = std::clamp<int64_t>(CACHE / (36 * tiles * std::max(C, K) * sizeof(float)), 1, to - from);
  at::Tensor inputs = at::empty({36 * images * tiles * C}, options), outputs = at::empty({36 * images * tiles * K}, options);
  for (int64_t a = from; a < to; a += images) {
    int64_t b = std::min(to, a + images), T = (b - a) * tiles;
    action(a, b, inputs.narrow(0, 0, 36 * T * C).view({36, T, C}), outputs.narrow(0, 0, 36 * T * K).view({36, T, K}));
  }
}

// x (N, H, W, C), transformed weights U (36, C, K) -> (N, H, W, K)
at::Tensor convolve(const at::Tensor& x, const at::Tensor& U) {
  int64_t N = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3), K = U.size(2);
  at::Tensor y = at::empty({N, H, W, K}, x.options());
  at::parallel_for(0, N, 1, [&](int64_t from, int64_t to) {
    each_part(from, to, H * W / 16, C, K, x.options(), [&](int64_t a, int64_t b, at::Tensor V, at::Tensor M) {
      transform_inputs(x.const_data_ptr<float>(), {a, b, H, W, C}, V.mutable_data_ptr<float>());
      at::bmm_out(M, V, U);
      transform_outputs(M.const_data_ptr<float>(), {a, b, H, W, K}, y.mutable_data_ptr<float>());
    });
  });
  return y;
}

// x (N, H, W, C), gradient dy (N, H, W, K) -> gradient of the transformed weights (36, C, K)
at::Tensor weight_gradient(const at::Tensor& x, const at::Tensor& dy) {
  int64_t N = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3), K = dy.size(3);
  at::Tensor dU = at::zeros({at::get_num_threads(), 36, C, K}, x.options());  // a sum for each thread
  at::parallel_for(0, N, 1, [&](int64_t from, int64_t to) {
    at::Tensor own = dU[at::get_thread_num()];
    each_part(from, to, H * W / 16, C, K, x.options(), [&](int64_t a, int64_t b, at::Tensor V, at::Tensor M) {
      transform_inputs(x.const_data_ptr<float>(), {a, b, H, W, C}, V.mutable_data_ptr<float>());
      transform_gradients(dy.const_data_ptr<float>(), {a, b, H, W, K}, M.mutable_data_ptr<float>());
      own.baddbmm_(V.transpose(1, 2), M);
    });
  });
  return dU.sum(0);
}

}  // namespace

TORCH_LIBRARY(cifar_lib, library) {
  library.def("winograd_convolve(Tensor x, Tensor weights) -> Tensor", &convolve);
  library.def("winograd_weight_gradient(Tensor x, Tensor gradient) -> Tensor", &weight_gradient);
}
