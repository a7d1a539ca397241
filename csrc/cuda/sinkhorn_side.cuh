// What is known of the rows or the columns of a Sinkhorn problem beside its kernel, and which numbers float32 can tell.
#pragma once

#include <math.h>

#include "common.cuh"

namespace dpdiff {

constexpr float kTiny = 0x1p-126f, kLn2 = 0.69314718056f;
// K is without what is below 2^-126; columns' scalings are at most kMostScaling, so that row sums from kLeastRowSum of
// b's mass are right to float32, and columns' from kLeastColumnSum of the sum of a phi.
constexpr float kMostScaling = 0x1p30f, kLeastScaling = 0x1p-60f;
constexpr float kLeastRowSum = 0x1p-72f, kLeastColumnSum = 0x1p-96f;
constexpr double kMostExponent = 30;  // of the kernel of zero potentials

// A number as what float32 holds of it, and the rest.
struct Pair {
  float high, low;

  static DPDIFF_DEVICE Pair of(double x) {
    const float high = float(x);
    return {high, fabsf(high) < INFINITY ? float(x - high) : 0.0f};
  }
  static DPDIFF_DEVICE Pair sum(float a, float b) {  // Knuth's
    const float s = a + b, t = s - a;
    return {s, (a - (s - t)) + (b - t)};
  }
  DPDIFF_DEVICE double wide() const { return double(high) + low; }
};

// The block's rows, or all columns: arrays of a number each, one after the other.
struct SinkhornSide {
  float* at;
  int n, padded;
  double tau;
  float damp;
  bool relaxed;
  int now = 0;  // rows' scalings and targets change places with the next ones

  DPDIFF_DEVICE SinkhornSide(float* at, int n, int padded, bool relaxed, double tau, double eps)
      : at(at), n(n), padded(padded), tau(tau), damp(relaxed ? tau / (tau + eps) : 1.0), relaxed(relaxed) {}

  DPDIFF_DEVICE float* array(int k) const { return at + int64_t(k) * padded; }
  DPDIFF_DEVICE float* high() const { return array(0); }  // of f0, g0
  DPDIFF_DEVICE float* low() const { return array(1); }
  DPDIFF_DEVICE float* weight() const { return array(2); }         // as given; -1 where nothing reaches
  DPDIFF_DEVICE float* scaling() const { return array(3 + now); }  // phi, psi
  DPDIFF_DEVICE float* next_scaling() const { return array(4 - now); }
  DPDIFF_DEVICE float* moved() const { return array(4); }  // of columns: weight * scaling
  DPDIFF_DEVICE float* pull() const { return array(5); }   // relaxed: exp(-base / (tau + eps))
  DPDIFF_DEVICE float* target() const { return array(6 + now); }  // relaxed: weight exp(-potential / tau)
  DPDIFF_DEVICE float* next_target() const { return array(7 - now); }
  DPDIFF_DEVICE float* seen() const { return array(relaxed ? 7 : 5); }  // of columns: the scalings at the last look, or 0

  DPDIFF_DEVICE Pair base(int i) const { return {high()[i], low()[i]}; }
  DPDIFF_DEVICE void set_base(int i, Pair x) const { high()[i] = x.high, low()[i] = x.low; }
  DPDIFF_DEVICE float aim(int i) const { return relaxed ? target()[i] : fmaxf(weight()[i], 0.0f); }
  DPDIFF_DEVICE void leave_out(int i) const {
    set_base(i, {0.0f, 0.0f});
    weight()[i] = -1.0f;
    if (relaxed) target()[i] = 0.0f;
  }
  DPDIFF_DEVICE double potential(int i) const { return weight()[i] < 0 ? INFINITY : base(i).wide(); }
};

// The least and the greatest of the sums and of the scalings of a thread's points.
struct SinkhornExtents {
  float least_sum = INFINITY, most_sum = 0, least = INFINITY, most = 0;

  DPDIFF_DEVICE void include(bool counts, float sum, float scaling, bool relaxed) {
    if (!counts) return;
    least_sum = fminf(least_sum, sum), most_sum = fmaxf(most_sum, sum);
    if (relaxed) least = fminf(least, scaling), most = fmaxf(most, scaling);
  }
  // Balanced sides' scalings are the reciprocals of the sums.
  DPDIFF_DEVICE void finish(bool relaxed) {
    if (!relaxed) least = reciprocal(most_sum), most = reciprocal(least_sum);
  }
  // Sums are right from `right` on.
  DPDIFF_DEVICE bool bad(float right) const {
    return !(least_sum >= fmaxf(right, kTiny) && most_sum < 0x1p120f && least >= 0x1p-100f && most < 0x1p100f);
  }
  DPDIFF_DEVICE bool large() const { return !(least >= kLeastScaling && most <= kMostScaling); }
};

}  // namespace dpdiff
