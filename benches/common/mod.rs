//! What the benches of networks share.

use std::time::Duration;

use criterion::Bencher;
use depthshrinker::device::Device;
use depthshrinker::device::cuda::Cuda;
use depthshrinker::dtype::Dtype;
use depthshrinker::measure::{Limits, NetworkCase, NetworkRun, Utilization};
use depthshrinker::report::limits_text;

/// The host, and a CUDA device in f32 and f16 where there is one, each with its measured limits.
pub fn devices() -> Vec<(Device, Limits)> {
    let mut devices = vec![Device::Cpu];
    if Cuda::count() > 0 {
        for precision in [Dtype::F32, Dtype::F16] {
            match Device::open("cuda", precision) {
                Ok(device) => devices.push(device),
                Err(error) => eprintln!("cuda in {precision}: {error}"),
            }
        }
    }
    let measured = devices.into_iter().map(|device| {
        let limits = Limits::measure(&device, Duration::from_secs(4)).expect("the device works");
        print!("{} in {}: {}", device.name(), device.precision(), limits_text(&limits, None));
        (device, limits)
    });
    measured.collect()
}

/// A network that is being timed; a GPU is timed by its own clock.
pub struct Timed<'a> {
    device: &'a Device,
    case: &'a NetworkCase,
    batch: usize,
    time: Duration,
    passes: u64,
}

impl<'a> Timed<'a> {
    pub fn new(device: &'a Device, case: &'a NetworkCase, batch: usize) -> Self {
        Self { device, case, batch, time: Duration::ZERO, passes: 0 }
    }

    /// What criterion times.
    pub fn run(&mut self, bencher: &mut Bencher<'_>) {
        let mut run = NetworkRun::new(self.device, self.case, self.batch).expect("it can be planned");
        let mut launches = run.launches().expect("the device works");
        bencher.iter_custom(|passes| {
            let took = launches.total(passes).expect("the device works");
            (self.time, self.passes) = (self.time + took, self.passes + passes);
            took
        });
    }

    /// Seconds of a pass, and what it used of the device; `None` where criterion's filter left the case out.
    pub fn used(&self, limits: &Limits) -> Option<(f64, Utilization)> {
        let seconds = self.time.as_secs_f64() / self.passes as f64;
        let costs = self.case.costs(self.device.backend()).expect("the graph is well formed");
        (self.passes > 0).then(|| (seconds, limits.roofline.utilization(&costs, self.batch, seconds)))
    }
}
