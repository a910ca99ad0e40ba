/* Writes JPEGs that Pillow does not: any sampling, any order of scans. */
#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

static jmp_buf escape;

static void leave(j_common_ptr info) {
    info->err->output_message(info);
    longjmp(escape, 1);
}

/* RGB rows to a JPEG of at most `room` bytes; returns its size, or 0. `sampling`: horizontal and vertical of each of three
   components. `scans`, of eight numbers each: how many components, which three, Ss, Se, Ah, Al; none for one scan. */
unsigned long encode(const unsigned char *rgb, int width, int height, const int *sampling, const int *scans, int count,
                     int quality, int interval, unsigned char *out, unsigned long room) {
    struct jpeg_compress_struct info;
    struct jpeg_error_mgr error;
    jpeg_scan_info list[64];
    unsigned char *bytes = out;
    unsigned long size = room;
    info.err = jpeg_std_error(&error);
    error.error_exit = leave;
    if (setjmp(escape)) return 0;
    jpeg_create_compress(&info);
    jpeg_mem_dest(&info, &bytes, &size);
    info.image_width = width;
    info.image_height = height;
    info.input_components = 3;
    info.in_color_space = JCS_RGB;
    jpeg_set_defaults(&info);
    jpeg_set_quality(&info, quality, TRUE);
    info.restart_interval = interval;
    for (int i = 0; i < 3; ++i) {
        info.comp_info[i].h_samp_factor = sampling[2 * i];
        info.comp_info[i].v_samp_factor = sampling[2 * i + 1];
    }
    for (int i = 0; i < count && i < 64; ++i) {
        const int *scan = scans + 8 * i;
        list[i].comps_in_scan = scan[0];
        for (int c = 0; c < scan[0]; ++c) list[i].component_index[c] = scan[1 + c];
        list[i].Ss = scan[4];
        list[i].Se = scan[5];
        list[i].Ah = scan[6];
        list[i].Al = scan[7];
    }
    if (count > 0) {
        info.scan_info = list;
        info.num_scans = count;
    }
    jpeg_start_compress(&info, TRUE);
    while (info.next_scanline < info.image_height) {
        JSAMPROW row = (JSAMPROW)(rgb + 3 * (size_t)width * info.next_scanline);
        jpeg_write_scanlines(&info, &row, 1);
    }
    jpeg_finish_compress(&info);
    jpeg_destroy_compress(&info);
    return bytes == out ? size : 0;
}
