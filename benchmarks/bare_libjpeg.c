/* libjpeg-turbo and nothing else: decodes to RGB rows and forgets them. What the decoder is held against. */
#include <stddef.h>
#include <stdio.h>

#include <jpeglib.h>

/* Returns the number of rows. `row` holds one. */
int decode(const unsigned char *data, unsigned long size, unsigned char *row) {
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr error;
    info.err = jpeg_std_error(&error);
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data, size);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    while (info.output_scanline < info.output_height) jpeg_read_scanlines(&info, &row, 1);
    const int rows = (int)info.output_height;
    jpeg_finish_decompress(&info);
    jpeg_destroy_decompress(&info);
    return rows;
}
