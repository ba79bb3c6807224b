//! The emulated driver must notice the mistakes that a GPU would make something undefined of. Each kernel of
//! `cuda-emulator/tests/faulty.cu` runs in a process of its own, since an error of the device stays.

use std::process::Command;
use std::sync::Mutex;

use super::driver::{Arg, Device, Launch};
use super::prebuilt::UNITS;
use super::probe::{DRIVER_VARIABLE, devices};
use super::{CudaBackend, testing};
use crate::{Backend, Pass, Turn};

const KERNEL_VARIABLE: &str = "CUPOLA_TEST_KERNEL";
const INPUTS: usize = 512;

fn input(i: usize) -> f32 {
    (i % 13) as f32 - 5.0
}

/// Not a test: launches the kernel named in the environment four times, two blocks each, and prints what came out.
#[test]
#[ignore = "started by the other tests, as a process of its own"]
fn run_one_kernel() {
    let name: &'static str = std::env::var(KERNEL_VARIABLE).unwrap().leak();
    let (threads, blocks) = if name.starts_with(['m', 'r', 'w']) && !name.contains("past") && name != "misaligned" {
        (32, 1)
    } else {
        (128, 2)
    };
    let mut device = Device::open(devices().unwrap()[0].clone()).unwrap();
    let bytes: Vec<u8> = (0..INPUTS).flat_map(|i| input(i).to_le_bytes()).collect();
    let mut x = device.alloc(bytes.len(), "x").unwrap();
    device.upload(&mut x, 0, &bytes).unwrap();
    let out = device.alloc(4 * 256, "out").unwrap();
    let kernel = device.kernel(UNITS[0].0, name).unwrap();
    let shape = Launch { grid: (blocks, 1), block: threads, shared: 0 };
    let result = (0..4).try_for_each(|_| device.launch(&kernel, shape, &[x.at(0), out.at(0)]));
    let mut values = vec![0; 4 * 256];
    match result.and_then(|()| device.download(&out, 0, &mut values)) {
        Err(error) => println!("\nresult: {error}"),
        Ok(()) => {
            let values = values.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]).to_string());
            println!("\nresult: {}", values.collect::<Vec<_>>().join(" "));
        }
    }
}

/// What came of the kernel, and what the emulated driver printed.
fn run(kernel: &str) -> (String, String) {
    let library = testing::build_driver("cuda-emulator-tests", &testing::manifest("cuda-emulator/tests")).unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "--test-threads=1", "cuda::emulator_tests::run_one_kernel"])
        .env(DRIVER_VARIABLE, library)
        .env(KERNEL_VARIABLE, kernel)
        .output()
        .unwrap();
    let printed = String::from_utf8(child.stdout).unwrap();
    let result = printed.lines().find_map(|line| line.strip_prefix("result: "));
    let said = String::from_utf8(child.stderr).unwrap();
    (result.unwrap_or_else(|| panic!("{printed}{said}")).to_owned(), said)
}

fn values(kernel: &str) -> Vec<f32> {
    let (result, said) = run(kernel);
    assert_eq!(said, "", "{kernel}");
    result.split(' ').map(|value| value.parse().unwrap()).collect()
}

#[test]
fn a_correct_kernel_gives_its_result() {
    let got = values("correct");
    for block in 0..2 {
        let sum: f32 = (0..128).map(|i| input(128 * block + i)).sum();
        assert!(got[128 * block..128 * (block + 1)].iter().all(|&value| value == sum), "{got:?}");
    }
}

#[test]
fn a_missing_barrier_gives_poison() {
    assert!(values("lacks_barrier").iter().any(|value| value.is_nan()));
}

#[test]
fn a_copy_that_is_not_waited_for_gives_poison() {
    assert!(values("does_not_wait").iter().all(|value| value.is_nan()));
}

#[test]
fn faults_stop_the_kernel_and_stay() {
    for (kernel, error, why) in [
        ("writes_past_end", "CUDA_ERROR_ILLEGAL_ADDRESS", "outside of every allocation"),
        ("writes_past_shared", "CUDA_ERROR_ILLEGAL_ADDRESS", "past the end of a SHARED variable"),
        ("misaligned", "CUDA_ERROR_MISALIGNED_ADDRESS", "not a multiple of its size"),
        ("diverges", "CUDA_ERROR_LAUNCH_FAILED", "some lanes of the warp never reach"),
    ] {
        let (result, said) = run(kernel);
        assert!(result.contains(error), "{kernel}: {result}");
        assert!(said.contains(why) && said.contains(kernel), "{kernel}: {said}");
    }
}

#[test]
fn warp_operations_are_those_of_cuda() {
    let got = values("warp_operations");
    for (i, &got) in got.iter().enumerate().take(32) {
        let down = input(if i + 1 < 32 { i + 1 } else { i });
        let up = input(if i >= 2 { i - 2 } else { i });
        // Lanes 0, 3, .. 30 vote: 11 of them, of which 3 is the first above 0.
        assert_eq!(got, down + up + input(5) + 11.0 + 1.0 + 2.0 + 2.0, "lane {i}");
    }
}

#[test]
fn tensor_core_fragments_are_those_of_cuda() {
    let got = values("multiplies");
    for row in 0..16 {
        for column in 0..8 {
            let dot: f32 = (0..16).map(|k| input(16 * row + k) * input(256 + 8 * k + column)).sum();
            assert_eq!(got[8 * row + column], dot, "[{row}, {column}]");
        }
    }
}

#[test]
fn numbers_round_and_copies_come_group_by_group() {
    let got = values("rounds");
    for i in 0..32 {
        assert_eq!(got[i], input(i));
        assert_eq!(got[32 + i], input(i));
        assert_eq!(got[64 + i], 0.0, "the second copy of the first group writes zeros");
        assert_eq!(got[96 + i], input(4 * i));
    }
}

#[test]
fn arguments_are_checked_against_the_kernel() {
    let Ok(info) = testing::device() else { panic!("the emulated driver needs g++") };
    let mut device = Device::open(info).unwrap();
    let memory = device.alloc(1024, "test").unwrap();
    let kernel = device.kernel("elementwise", "argmax").unwrap();
    let shape = Launch { grid: (1, 1), block: 32, shared: 0 };
    let error = device.launch(&kernel, shape, &[memory.at(0), Arg::U32(1)]).unwrap_err();
    assert!(error.to_string().starts_with("argmax: expected parameters of ["), "{error}");
}

/// Not a test: repeats a pass on a driver that captures nothing.
#[test]
#[ignore = "started by the next test, as a process of its own"]
fn repeat_a_pass() {
    let mut backend = CudaBackend::new(devices().unwrap()[0].clone()).unwrap();
    let out = backend.alloc_buffer(1, 32).unwrap();
    let norm = backend.load_vector(&[1.0; 32]).unwrap();
    assert!(backend.record_passes(true));
    for _ in 0..3 {
        let pass = Pass {
            tokens: &[0],
            carried: &[],
            turn: Turn::A,
            spans: &[],
            last_spans: &[],
            kept: &[],
            block_table: &[],
            repeated: Some(0),
        };
        backend.begin_pass(&pass).unwrap();
        let y = backend.alloc_buffer(1, 32).unwrap();
        backend.for_each_row(y, 1, &|_, values| values.fill(3.0)).unwrap();
        backend.replay(&mut |backend| backend.rms_norm_add(y, 1, (norm, 0.0), out)).unwrap();
    }
    let sum = Mutex::new(0.0);
    backend.for_each_row(out, 1, &|_, values| *sum.lock().unwrap() = values[31]).unwrap();
    println!("\nresult: {} {:?}", sum.into_inner().unwrap(), backend.recorded());
}

#[test]
fn without_captures_every_pass_runs_as_it_is() {
    let library = testing::emulated_driver().unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "--test-threads=1", "cuda::emulator_tests::repeat_a_pass"])
        .env(DRIVER_VARIABLE, library)
        .env("CUPOLA_EMULATOR_NO_GRAPHS", "1")
        .output()
        .unwrap();
    let printed = String::from_utf8(child.stdout).unwrap();
    let result = printed.lines().find_map(|line| line.strip_prefix("result: ")).expect(&printed);
    assert!(result.starts_with("3 Recorded { graphs: 0, failed: Some("), "{result}");
}
