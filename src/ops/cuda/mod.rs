//! Operations on a GPU: each function selects an instance of a kernel and launches it on its operands.
//!
//! Configurations ([`crate::ops::config`]) determine grids, tiles and workspaces. Every launch goes through [`Call`], which
//! takes each operand together with the number of elements that the kernel reads or writes, and rejects a shorter one.

pub(super) mod activation;
pub(super) mod augment;
pub(super) mod batch_norm;
mod call;
pub(super) mod conv;
mod dense_direct;
mod depthwise;
pub(super) mod elementwise;
pub(super) mod loss;
pub(super) mod optimizer;
pub(super) mod pool;

pub(super) use call::{Call, Floats, int, long};

use crate::device::gpu::GpuView;
use crate::ops::config::{KernelPass, Problem, note, resolve};

/// Returns the configuration of a launch on the device of `of`. A forced configuration that does not solve the problem
/// yields `None`, and the next check of the device reports it.
pub(super) fn configured<P: Problem>(problem: &P, pass: KernelPass, of: GpuView<'_>) -> Option<P::Config> {
    match resolve(problem, pass, of.gpu(), of.dtype()) {
        Ok(config) => {
            note(problem, pass, (of.gpu(), of.dtype()), config);
            Some(config)
        }
        Err(error) => {
            of.gpu().fail(error);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;

    use crate::device::dry_run::DryRun;
    use crate::device::gpu::Gpu;
    use crate::device::{Buffer, Device, View, ViewMut};
    use crate::dtype::Dtype;
    use crate::ops::activation::{self, Act};
    use crate::ops::batch_norm::{self, BatchNormProblem, Normalised, StatisticsOut, SumsOut};
    use crate::ops::config::{Kernels, force};
    use crate::ops::conv::{
        self, BatchNormBefore, Bias, Conv, ConvFamily, ConvGradient, ConvInput, ConvProblem, GradientsOut,
    };
    use crate::ops::dropout::{self, DropoutStream};
    use crate::ops::epilogue::{BiasOperand, Epilogue};
    use crate::ops::linear::{self, LinearProblem};
    use crate::ops::pad::{self, PadProblem};
    use crate::ops::pool::{self, PoolProblem};
    use crate::ops::{add, copy};
    use crate::shape::{Lines, Shape, Window};

    /// A device that runs nothing: the tests look at the arguments of launches only.
    fn device() -> (Arc<Gpu>, Device) {
        let gpu = Gpu::new(Box::new(DryRun::new(80)));
        (gpu.clone(), Device::Gpu(gpu, Dtype::F32))
    }

    /// Operands of some lengths, one of which is shortened by an element.
    struct Operands(Vec<Buffer>);

    impl Operands {
        fn new(device: &Device, lens: &[usize], short: Option<usize>) -> Self {
            let len = |(at, len): (usize, &usize)| len - usize::from(Some(at) == short);
            Self(lens.iter().enumerate().map(len).map(|len| device.zeros(len).unwrap()).collect())
        }

        fn read(&self, at: usize) -> View<'_> {
            self.0[at].view(0..self.0[at].len())
        }

        /// Taken, so that the others can be read.
        fn take(&mut self, at: usize) -> Buffer {
            std::mem::take(&mut self.0[at])
        }
    }

    fn all(buffer: &mut Buffer) -> ViewMut<'_> {
        let len = buffer.len();
        buffer.view_mut(0..len)
    }

    /// An operation runs on operands of these lengths, and refuses to when any one of them is an element shorter.
    fn needs_all_of(what: &str, lens: &[usize], run: impl Fn(&Device, Operands)) {
        let (gpu, device) = device();
        run(&device, Operands::new(&device, lens, None));
        gpu.check().unwrap_or_else(|e| panic!("{what}: {e}"));
        for short in 0..lens.len() {
            let operands = Operands::new(&device, lens, Some(short));
            let told = catch_unwind(AssertUnwindSafe(|| run(&device, operands))).err();
            let told = told.unwrap_or_else(|| panic!("{what}: operand {short} may be too short"));
            let told = told.downcast_ref::<String>().cloned();
            let told = told.unwrap_or_else(|| panic!("{what}, operand {short}: refused without a word"));
            assert!(told.contains("are needed"), "{what}, operand {short}: {told}");
        }
    }

    fn problem(c_in: usize, c_out: usize, window: Window, groups: usize) -> ConvProblem {
        let conv = Conv { c_in, c_out, window, groups, bias: Bias::None };
        ConvProblem::new(&conv, Shape::new(9, 7, c_in), 2).unwrap()
    }

    #[test]
    fn a_convolution_refuses_short_operands() {
        let window = |k, stride| Window::square(k, stride, k / 2);
        for p in [
            problem(8, 16, window(1, 1), 1),
            problem(8, 16, window(3, 2), 1),
            problem(8, 8, window(3, 1), 8),
            problem(8, 8, window(5, 2), 8),
            problem(7, 7, window(3, 1), 7),
        ] {
            let (x, w, y, c) = (p.n * p.input.len(), p.weight_len(), p.n * p.output.len(), p.output.c);
            needs_all_of("forward", &[x, w, c, y, y], |_, mut o| {
                let mut y = o.take(4);
                let epilogue = Epilogue { bias: BiasOperand::Channel(o.read(2)), residual: Some(o.read(3)), act: None };
                conv::forward(&p, o.read(0), o.read(1), &epilogue, all(&mut y));
            });
            needs_all_of("forward with a map", &[x, w, p.output.len(), y], |_, mut o| {
                let mut y = o.take(3);
                let epilogue = Epilogue { bias: BiasOperand::Map(o.read(2)), ..Epilogue::default() };
                conv::forward(&p, o.read(0), o.read(1), &epilogue, all(&mut y));
            });
            for accumulate in [false, true] {
                needs_all_of("backward", &[x, w, y, x, w], |_, mut o| {
                    let (mut dx, mut dw) = (o.take(3), o.take(4));
                    let out =
                        GradientsOut { dx: Some((all(&mut dx), accumulate)), dw: all(&mut dw), db: None, sums: None };
                    let (x, dy) = (ConvInput::Stored(o.read(0)), ConvGradient::Stored(o.read(2)));
                    conv::backward(&p, x, o.read(1), dy, out);
                });
            }
        }
    }

    /// γ, β and statistics from operand `first` on, over what is operand `y`.
    fn norm(o: &Operands, y: usize, first: usize) -> Normalised<'_> {
        let (gamma, beta, statistics) = (o.read(first), o.read(first + 1), o.read(first + 2));
        Normalised { y: o.read(y), gamma, beta, statistics, residual: None, act: Some(Act::new(None, 0.0)) }
    }

    fn norm_of(c: usize, pixels: usize) -> BatchNormProblem {
        BatchNormProblem { shape: Lines { lines: pixels, w: 1, c }, eps: 1e-5, momentum: 0.1 }
    }

    #[test]
    fn a_convolution_between_batch_norms_refuses_short_operands() {
        let window = |k, stride| Window::square(k, stride, k / 2);
        for p in [
            problem(8, 16, window(1, 1), 1),
            problem(7, 5, window(1, 1), 1),
            problem(8, 8, window(3, 1), 8),
            problem(8, 8, window(5, 2), 8),
        ] {
            let (x, w, y, c_in, c) = (p.n * p.input.len(), p.weight_len(), p.n * p.output.len(), p.input.c, p.output.c);
            let after = norm_of(c, y / c);
            // x and its γ, β, statistics; w; y; statistics and running ones.
            let lens = [x, c_in, c_in, 2 * c_in, w, y, 2 * c, c, c];
            needs_all_of("forward with statistics", &lens, |_, mut o| {
                let (mut y, mut saved, mut mean, mut var) = (o.take(5), o.take(6), o.take(7), o.take(8));
                let out = StatisticsOut { statistics: all(&mut saved), running: [all(&mut mean), all(&mut var)] };
                let x = ConvInput::Normalised(norm(&o, 0, 1));
                conv::forward_with_statistics(&p, x, o.read(4), all(&mut y), &after, out);
            });
            // x and its γ, β, statistics; y; dz; coefficients, which stand for y's γ, β and statistics.
            let lens = [x, c_in, c_in, 2 * c_in, y, y, 4 * c, w, x, 4 * c_in, c_in, c_in];
            needs_all_of("input gradient on load", &lens, |device, mut o| {
                let spare = device.zeros(2 * c).unwrap();
                let (mut dx, mut sums, mut d_gamma, mut d_beta) = (o.take(8), o.take(9), o.take(10), o.take(11));
                let (sums, d_gamma, d_beta) = (all(&mut sums), all(&mut d_gamma), all(&mut d_beta));
                let sums = SumsOut { sums, d_gamma, d_beta, score: None };
                let spare = |len| spare.view(0..len);
                let of = Normalised { gamma: spare(c), beta: spare(c), statistics: spare(2 * c), ..norm(&o, 4, 1) };
                let dy = ConvGradient::Formed { problem: after, of, dz: o.read(5), sums: o.read(6) };
                if p.family() == ConvFamily::Depthwise {
                    let mut dw = device.zeros(w).unwrap();
                    let out =
                        GradientsOut { dx: Some((all(&mut dx), false)), dw: all(&mut dw), db: None, sums: Some(sums) };
                    return conv::backward(&p, ConvInput::Normalised(norm(&o, 0, 1)), o.read(7), dy, out);
                }
                let before = BatchNormBefore { of: norm(&o, 0, 1), sums };
                conv::input_gradient(&p, dy, o.read(7), (all(&mut dx), false), Some(before));
            });
            let lens = [x, c_in, c_in, 2 * c_in, y, y, 4 * c, w];
            needs_all_of("weight gradient on load", &lens, |device, mut o| {
                let spare = device.zeros(2 * c).unwrap();
                let mut dw = o.take(7);
                let spare = |len| spare.view(0..len);
                let of = Normalised { gamma: spare(c), beta: spare(c), statistics: spare(2 * c), ..norm(&o, 4, 1) };
                let dy = ConvGradient::Formed { problem: after, of, dz: o.read(5), sums: o.read(6) };
                let (x, weights) = (ConvInput::Normalised(norm(&o, 0, 1)), device.zeros(w).unwrap());
                if p.family() == ConvFamily::Depthwise {
                    let out = GradientsOut { dx: None, dw: all(&mut dw), db: None, sums: None };
                    return conv::backward(&p, x, weights.view(0..w), dy, out);
                }
                conv::weight_gradient(&p, x, dy, all(&mut dw));
            });
        }
    }

    #[test]
    fn a_batch_norm_refuses_short_operands() {
        let p = BatchNormProblem { shape: Lines { lines: 6, w: 7, c: 8 }, eps: 1e-5, momentum: 0.1 };
        let (n, c) = (p.shape.len(), p.shape.c);
        // y, γ, β, statistics, residual.
        fn of(o: &Operands) -> Normalised<'_> {
            let (y, gamma, beta, statistics) = (o.read(0), o.read(1), o.read(2), o.read(3));
            Normalised { y, gamma, beta, statistics, residual: Some(o.read(4)), act: Some(Act::new(None, 0.0)) }
        }
        needs_all_of("statistics", &[n, c, c, 2 * c], |_, mut o| {
            let (mut mean, mut var, mut saved) = (o.take(1), o.take(2), o.take(3));
            let out = StatisticsOut { statistics: all(&mut saved), running: [all(&mut mean), all(&mut var)] };
            batch_norm::statistics(&p, o.read(0), out);
        });
        needs_all_of("running statistics", &[c, c, 2 * c], |_, mut o| {
            let mut saved = o.take(2);
            batch_norm::running_statistics(&p, o.read(0), o.read(1), all(&mut saved));
        });
        needs_all_of("normalisation", &[n, c, c, 2 * c, n, n], |_, mut o| {
            let mut z = o.take(5);
            batch_norm::normalise(&p, &of(&o), all(&mut z));
        });
        needs_all_of("sums", &[n, c, c, 2 * c, n, n, n, 4 * c, c, c], |_, mut o| {
            let (mut d_residual, mut sums, mut d_gamma, mut d_beta) = (o.take(6), o.take(7), o.take(8), o.take(9));
            let (d_gamma, d_beta) = (all(&mut d_gamma), all(&mut d_beta));
            let out = SumsOut { sums: all(&mut sums), d_gamma, d_beta, score: None };
            batch_norm::gradient_sums(&p, &of(&o), o.read(5), Some((all(&mut d_residual), true)), out);
        });
        needs_all_of("gradient", &[n, c, c, 2 * c, n, n, 4 * c, n], |_, mut o| {
            let mut dy = o.take(7);
            batch_norm::gradient(&p, &of(&o), o.read(5), o.read(6), all(&mut dy), false);
        });
    }

    #[test]
    fn small_operations_refuse_short_operands() {
        needs_all_of("global pool", &[2 * 20 * 8, 16], |_, mut o| {
            let mut y = o.take(1);
            pool::global::forward(Shape::new(4, 5, 8), o.read(0), all(&mut y));
        });
        let window = Window::square(3, 2, 1);
        let (input, output) = (Shape::new(9, 7, 8), Shape::new(5, 4, 8));
        let p = PoolProblem { n: 2, input, output, window };
        needs_all_of("max-pool", &[2 * input.len(), 2 * output.len()], |_, mut o| {
            let mut y = o.take(1);
            pool::max::forward(&p, o.read(0), all(&mut y));
        });
        needs_all_of("max-pool's gradient", &[2 * input.len(), 2 * output.len(), 2 * input.len()], |_, mut o| {
            let mut dx = o.take(2);
            pool::max::backward(&p, o.read(0), o.read(1), all(&mut dx), true);
        });
        let p = PadProblem { n: 2, input, output, top: -2, left: 1 };
        needs_all_of("padding", &[2 * input.len(), 2 * output.len()], |_, mut o| {
            let mut y = o.take(1);
            pad::forward(&p, o.read(0), all(&mut y), true);
        });
        let p = LinearProblem { n: 3, c_in: 8, c_out: 5 };
        needs_all_of("linear", &[24, 40, 5, 15], |_, mut o| {
            let mut y = o.take(3);
            linear::forward(p, o.read(0), o.read(1), o.read(2), all(&mut y));
        });
        needs_all_of("linear's gradient", &[24, 40, 15, 24, 40, 5], |_, mut o| {
            let (mut dx, mut dw, mut db) = (o.take(3), o.take(4), o.take(5));
            let inputs = linear::LinearInputs { x: o.read(0), w: o.read(1), dy: o.read(2) };
            let dx = Some((all(&mut dx), false));
            linear::backward(p, inputs, linear::LinearGradientsOut { dx, dw: all(&mut dw), db: all(&mut db) });
        });
    }

    #[test]
    fn operations_on_flat_tensors_refuse_short_results() {
        let (gpu, device) = device();
        let (x, mut y) = (device.zeros(100).unwrap(), device.zeros(99).unwrap());
        let stream = DropoutStream::new(&device).unwrap();
        let refuses = |run: &mut dyn FnMut(View<'_>, ViewMut<'_>)| {
            catch_unwind(AssertUnwindSafe(|| run(x.view(0..100), y.view_mut(0..99)))).is_err()
        };
        let mut refuses = refuses;
        assert!(refuses(&mut |x, y| add::forward(x, x, y)));
        assert!(refuses(&mut |x, y| copy::accumulate(x, y)));
        assert!(refuses(&mut |x, y| copy::copy(x, y)));
        assert!(refuses(&mut |x, y| activation::forward(Act::new(None, 0.0), Lines { lines: 10, w: 10, c: 1 }, x, y)));
        assert!(refuses(&mut |x, y| dropout::apply(0.5, &stream, x, y, false)));
        gpu.check().unwrap();
    }

    #[test]
    fn a_slope_on_the_device_is_not_dropped() {
        let (_, device) = device();
        let p = problem(8, 16, Window::square(1, 1, 0), 1);
        let slope = device.zeros(1).unwrap();
        let run = |at: Option<View<'_>>| {
            let lens = [p.n * p.input.len(), p.weight_len(), p.n * p.output.len()];
            let mut o = Operands::new(&device, &lens, None);
            let mut y = o.take(2);
            let epilogue = Epilogue { act: Some(Act::new(None, 0.25).at(at)), ..Epilogue::default() };
            let run = || conv::forward(&p, o.read(0), o.read(1), &epilogue, all(&mut y));
            catch_unwind(AssertUnwindSafe(run)).is_ok()
        };
        assert!(run(None));
        assert!(!run(Some(slope.view(0..1))));
    }

    #[test]
    fn a_forced_configuration_that_does_not_serve_is_told_and_not_launched() {
        let (gpu, device) = device();
        let p = problem(8, 16, Window::square(1, 1, 0), 1);
        let run = || {
            let lens = [p.n * p.input.len(), p.weight_len(), p.n * p.output.len()];
            let mut o = Operands::new(&device, &lens, None);
            let mut y = o.take(2);
            conv::forward(&p, o.read(0), o.read(1), &Epilogue::default(), all(&mut y));
            gpu.check()
        };
        let kernels: Kernels = "pointwise_forward".parse().unwrap();
        force(&gpu, kernels, Some("64x64-scalar")).unwrap();
        run().unwrap();
        assert_eq!(gpu.launched().into_keys().collect::<Vec<_>>(), ["pointwise_forward<float, 64, 64, false>"]);
        force(&gpu, kernels, Some("128x128-vector")).unwrap();
        let told = run().unwrap_err().to_string();
        assert!(told.contains("pointwise_forward: configuration 128x128-vector does not serve"), "{told}");
        assert_eq!(gpu.launched().len(), 1);
        assert!(
            force(&gpu, kernels, Some("march14")).unwrap_err().to_string().contains("no configuration \"march14\"")
        );
        force(&gpu, kernels, None).unwrap();
        run().unwrap();
        assert_eq!(gpu.launched().len(), 2);
    }
}
