// What comes after the iterations: the plan and what is told of it.

template <class Source>
void Sinkhorn<Source>::finish(bool scaled) {
  double cost[kMostChunks] = {}, mass[kMostChunks] = {}, error[kMostChunks] = {};
  for_chunks([&](int64_t chunk, int64_t first, int64_t last, float* scratch) {
    std::fill_n(partial(chunk), width_, 0.0f);
    LaneSums of_quads, mass_of_quads, off_quads;  // whose quads are alike
    for (; first < last; ++first) {
      const float* block = kernel(first, scratch, scaled && Source::kStored);
      if (in_plan_ && scaled) {
        std::copy_n(block, width_ * kWidth, scratch);
        block = scratch;
      }
      for (int r = 0; r < kWidth; r += kGroup) {
        vfloat sums[kGroup] = {}, costs[kGroup] = {};
        finish_group(block, first * kWidth, r, partial(chunk), sums, costs);
        const vfloat of_rows = sum_rows(sums);
        of_quads.add(sum_rows(costs));
        mass_of_quads.add(of_rows);
        off_quads.add(absolute(of_rows - load_quad(rows_.target + first * kWidth + r)));
      }
    }
    cost[chunk] = of_quads.total() / kGroups;
    mass[chunk] = mass_of_quads.total() / kGroups;
    error[chunk] = off_quads.total() / kGroups;
    stream_end();
  });
  for (int64_t chunk = 1; chunk < chunks_; ++chunk) {
    cost[0] += cost[chunk];
    mass[0] += mass[chunk];
    error[0] += error[chunk];
  }
  for (int64_t j = 0; j < columns_.n; ++j) {
    float sum = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += partial(chunk)[j];
    error[0] += std::abs(sum - columns_.target[j]);
  }
  rows_.absorb(options_.eps);
  columns_.absorb(options_.eps);
  const double value = dual(rows_, problem_.f, problem_.f_wide) + dual(columns_, problem_.g, problem_.g_wide) -
                       options_.eps * (mass[0] - rows_.mass * columns_.mass);
  if (problem_.cost != nullptr) *problem_.cost = float(cost[0]);
  *problem_.value = float(value);
  *problem_.error = float(error[0] + rows_.stranded + columns_.stranded);
  *problem_.n_iters = used_;
}

// Writes rows r to r + 3 of the plan of a block, and adds it to the sums of rows and columns and, times the costs, to `costs`.
template <class Source>
DPDIFF_INLINE void Sinkhorn<Source>::finish_group(const float* block, int64_t i, int r, float* column_sums,
                                                  vfloat (&sums)[kGroup], vfloat (&costs)[kGroup]) const {
  vfloat u[kGroup];
  spread(load_quad(rows_.moved + i + r), u);
  const int64_t width = width_;  // which the stores below can't change
  const float *kernel = entry(block, width, 0, r), *scaled = columns_.moved;
  const auto go = [&](const auto& cost, const auto& write) __attribute__((always_inline)) {
    for (int64_t j = 0; j < width; j += kWidth) {
      const vfloat v = load(scaled + j);
      vfloat column = load(column_sums + j);
#pragma GCC unroll 4
      for (int k = 0; k < kGroup; ++k) {
        const vfloat p = u[k] * load(kernel + j * kGroup + k * kWidth) * v;
        sums[k] += p;
        column += p;
        costs[k] += p * minimum(cost(k, j), broadcast(FLT_MAX));  // 0 where the cost is infinite, as the plan is
        write(k, j, p);
      }
      store(column_sums + j, column);
    }
  };
  const auto nothing = [](int, int64_t, vfloat) {};
  if constexpr (Source::kStored) {
    const int64_t m = columns_.n, row = i + r;
    float* plan = problem_.plan == nullptr ? nullptr : problem_.plan + row * m;
    const auto costs_of = source_.block(i);
    if (row + kGroup > rows_.n || m % kWidth != 0) {
      go([&](int k, int64_t j) { return costs_of.load(r + k, j); },
         [&](int k, int64_t j, vfloat p) {
           if (plan != nullptr && row + k < rows_.n) store_first(plan + k * m + j, p, m - j);
         });
      return;
    }
    const auto whole = [&](int k, int64_t j) { return load(costs_of.first + (r + k) * m + j); };
    if (plan == nullptr) {
      go(whole, nothing);
    } else if (problem_.streams && !in_plan_ && uintptr_t(plan) % sizeof(vfloat) == 0) {
      go(whole, [&](int k, int64_t j, vfloat p) { stream(plan + k * m + j, p); });
    } else {
      go(whole, [&](int k, int64_t j, vfloat p) { store(plan + k * m + j, p); });
    }
  } else {
    go([](int, int64_t) { return vfloat{}; }, nothing);
  }
}

// Writes a side's potentials and returns their part of the dual objective.
template <class Source>
double Sinkhorn<Source>::dual(const Side& side, float* potentials, double* wide) const {
  double sum = 0;
  for (int64_t i = 0; i < side.n; ++i) {
    const double potential = side.unreached[i] ? INFINITY : side.base[i];
    if (potentials != nullptr) potentials[i] = float(potential);
    if (wide != nullptr) wide[i] = potential;
    if (side.given[i] > 0) sum += side.given[i] * (side.relaxed() ? -side.tau * ::expm1(-potential / side.tau) : potential);
  }
  return sum;
}

template <class Source>
void Sinkhorn<Source>::fail() const {
  const SinkhornProblem& p = problem_;
  if (p.plan != nullptr) std::fill_n(p.plan, p.n * p.m, NAN);
  if (p.f != nullptr) std::fill_n(p.f, p.n, NAN);
  if (p.g != nullptr) std::fill_n(p.g, p.m, NAN);
  if (p.f_wide != nullptr) std::fill_n(p.f_wide, p.n, NAN);
  if (p.g_wide != nullptr) std::fill_n(p.g_wide, p.m, NAN);
  if (p.cost != nullptr) *p.cost = NAN;
  *p.value = *p.error = NAN;
  *p.n_iters = options_.n_iters;
}
