//! A steady pass asks for no memory: what it needs was planned with the engine, or is kept by the threads from the pass before.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use depthshrinker::config::Config;
use depthshrinker::device::Device;
use depthshrinker::engine::{Engine, EngineOptions, Fusion};
use depthshrinker::model::Model;
use depthshrinker::networks::{NetworkOptions, build};
use depthshrinker::ops::optimizer::{Optimizer, Update};
use depthshrinker::pipeline::fully_merged;
use depthshrinker::shape::Shape;
use depthshrinker::train::{StepBatch, StepImages, StepOptions, StepSettings, TrainStep};

/// Counts what is asked for, and hands it on to the system.
struct Counting;

static COUNT: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(size.saturating_sub(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations and bytes of each of some passes, the first of which prepare what the others reuse.
fn asked_for(passes: usize, mut pass: impl FnMut()) -> Vec<(usize, usize)> {
    let of_pass = |_| {
        let before = (COUNT.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
        pass();
        (COUNT.load(Ordering::Relaxed) - before.0, BYTES.load(Ordering::Relaxed) - before.1)
    };
    (0..passes).map(of_pass).collect()
}

fn model(network: &str) -> Model {
    let options = NetworkOptions::new(Shape::new(64, 64, 3), 10);
    Model::initialise(build(network, &options).unwrap(), 0).unwrap()
}

fn engine(network: &str, merged: bool, batch: usize) -> Engine {
    let model = model(network);
    let model = match merged {
        true => fully_merged(&model, None, &Config::default()).unwrap().expect("blocks merge"),
        false => model,
    };
    let options = EngineOptions { batch, fusion: Fusion::OnLoad, training: false, taps: Vec::new() };
    Engine::new(&Device::Cpu, &model, &options).unwrap()
}

const OPTIONS: StepOptions<'_> = StepOptions {
    batch: 0,
    fusion: Fusion::OnLoad,
    optimizer: Optimizer::Sgd { momentum: 0.9, nesterov: true },
    label_smoothing: 0.1,
    distillation: None,
    recorded: false,
};

// One test: what others ask for meanwhile would count too.
#[test]
fn a_steady_pass_asks_for_no_memory() {
    const PASSES: usize = 12;
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            for (network, merged, batch) in [
                ("mobilenetv2-0.35", false, 1),
                ("mobilenetv2-0.35", false, 6),
                ("mobilenetv2-0.35", true, 1),
                ("mobilenetv2-0.35", true, 6),
                ("resnet18", false, 2),
            ] {
                let mut engine = engine(network, merged, batch);
                let images = vec![0.5; batch * 64 * 64 * 3];
                let asked = asked_for(PASSES, || {
                    engine.forward(&images).unwrap();
                });
                // Which thread does what follows from nothing, so that a later pass may still find one unprepared.
                let last = if threads == 1 { asked[PASSES - 1] } else { *asked.iter().min().unwrap() };
                assert_eq!(last, (0, 0), "{network}, merged {merged}, batch {batch}, {threads} threads: {asked:?}");
            }
            for network in ["mobilenetv2-0.35", "resnet18"] {
                const BATCH: usize = 8;
                let (model, options) = (model(network), StepOptions { batch: BATCH, ..OPTIONS });
                let mut step = TrainStep::new(&[Device::Cpu], &model, &options).unwrap();
                let (images, labels) = (vec![0.5; BATCH * 64 * 64 * 3], [1, 2, 3, 4, 5, 6, 7, 8]);
                let batch = StepBatch { images: StepImages::Normalised(&images), labels: &labels };
                let update = Update { lr: 0.01, weight_decay: 1e-4, clip_norm: 5.0 };
                let asked = asked_for(PASSES, || {
                    step.run(&batch, StepSettings { seed: 0, step: 0, update }).unwrap();
                });
                let last = if threads == 1 { asked[PASSES - 1] } else { *asked.iter().min().unwrap() };
                assert_eq!(last, (0, 0), "a step of training of {network}, {threads} threads: {asked:?}");
            }
        });
    }
}
